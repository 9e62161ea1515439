"""Values summed by probabilities that a calibrator changed, compiled: after `cpu_masses`.

Untyped, because numba compiles each function per argument types; shapes are those of
`server.kernels.partials`.
"""

import numpy as np
from numba import njit, prange

from server.kernels.cpu_elements import FASTMATH, INNER, all_finite, store
from server.kernels.cpu_keys import mark
from server.kernels.cpu_masses import first_page, length, narrow, own_set, owners_of
from server.kernels.cpu_pools import neutral
from server.kernels.cpu_stretch import MOST, add_values, ask_for
from server.kernels.cpu_tiles import chosen_heads


@njit(inline="always")
def _changed(touched, factors, chosen, pools, live):
    """Fill `live` with the places in `chosen` of heads that change; how many there are."""
    count = 0
    for c in range(chosen.shape[0]):
        if touched[chosen[c]] and not neutral(factors[chosen[c]], pools):
            live[count] = c
            count += 1
    return count


@njit(inline="always")
def _weigh(p, count, own, weights, pools, factors, changed):
    """Multiply the probabilities of a page by what their owners get."""
    rest = factors.shape[0] - 1
    for j in range(count):
        changed[j] = p[j] * factors[rest]
    for g in range(pools):
        for j in range(count):
            changed[j] = p[j] * factors[g] if own[j] == g else changed[j]
    for g in range(rest - pools):
        for j in range(count):
            more = factors[pools + g] * weights[j] * p[j]
            changed[j] += more if own[j] == g else np.float32(0)


@njit(inline="always")
def _add_values(changed, width, pages, table, kv, place, sums):
    """Add up the values that a row sees; `place` is `(first page, position)`."""
    first, position = place
    block = changed.shape[2]
    last = position // block
    sums[:width] = 0
    for index in range(first, last + 1):
        values = pages[table[index], kv, 1].reshape(block, -1)
        following = pages[table[min(index + 1, last)], kv, 1].reshape(block, -1)
        count = length(position, index * block, block)
        for at in range(0, width, MOST):
            rows = min(MOST, width - at)
            add_values(changed[index - first], values, following, at, rows, count, sums)


@njit(fastmath=FASTMATH, error_model="numpy", cache=True)
def serial(
    task,
    tasks,
    output,
    pages,
    block_table,
    rows,
    pools,
    heads,
    window,
    kept,
    touched,
    factors,
    finite,
):
    """Every `tasks`-th pair of a row and a KV head from `task` on; see `parallel`."""
    _, _, most, group, block = kept.shape
    given = (
        np.empty(group, np.int64),
        np.empty(group, np.int64),
        owners_of(most, block),
        np.empty((most, group, block), np.float32),
        np.empty((group, output.shape[2]), np.float32),
    )
    of = rows, pools, heads, window, touched, factors
    _combine_rows(task, tasks, of, pages, block_table, given, kept, output, finite)


@njit(**INNER)
def _combine_rows(task, tasks, of, pages, block_table, given, kept, output, finite):
    rows, pools, heads, window, touched, factors = of
    token, request, slot, position = rows[:4]
    _, offsets, _, spans, above, sets, prompts = pools
    every, places, (owners, weights, own), changed, sums = given
    ways, marked, (kv_heads, _, group, block) = (offsets, spans), (-1, -1), kept.shape[1:]
    for index in range(task, position.shape[0] * kv_heads, tasks):
        r, kv, width = index // kv_heads, index % kv_heads, spans.shape[1]
        chosen = every[: chosen_heads(heads, slot[r], kv, group, every)]
        live = places[: _changed(touched[r], factors[r], chosen, width, places)]
        if live.shape[0] == 0:
            continue
        first = first_page(position[r], window, block)
        ask_for(pages[block_table[request[r], first], kv, 1])
        size = position[r] // block + 1 - first
        for i in range(live.shape[0]):
            h = chosen[live[i]]
            n = own_set(sets, prompts, slot[r], position[r], h)
            if marked != (r, n):
                marked = r, n
                mark(ways, n, pools, first * block, owners[: size * block], weights)
            for page in range(size):
                p, at = kept[r, kv, page, live[i]], slice(page * block, (page + 1) * block)
                count = length(position[r], (first + page) * block, block)
                who = narrow(p, count, owners[at], above[n], position[r], own)
                _weigh(p, count, who, weights[at], width, factors[r, h], changed[page, i])
        place, table = (first, position[r]), block_table[request[r]]
        _add_values(changed, live.shape[0], pages, table, kv, place, sums)
        for i in range(live.shape[0]):
            if all_finite(sums[i]):
                store(output[token[r], chosen[live[i]]], sums[i])
            else:
                finite[r] = False


@njit(parallel=True, cache=True)
def parallel(
    threads,
    output,
    pages,
    block_table,
    rows,
    pools,
    heads,
    window,
    kept,
    touched,
    factors,
    finite,
):
    """Write what the probabilities in `kept` come to with their factors, with so many threads.

    In `touched` bool `[rows, query_heads]`, and there only selected heads, whose factors change
    anything. A result that is not finite is not written, and clears the row's flag in `finite`.
    The rest is as of `cpu_masses.parallel`.
    """
    for thread in prange(threads):
        given = rows, pools, heads, window, kept, touched, factors, finite
        serial(np.int64(thread), threads, output, pages, block_table, *given)
