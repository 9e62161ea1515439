"""Values summed by probabilities that a calibrator changed, compiled: after `cpu_masses`.

Where pools have few keys, only their values are read, and the rest is what the stock output has of
it. That output was rounded, so this is done only where little of it cancels.

Untyped, because numba compiles each function per argument types; shapes are those of
`server.kernels.partials`.
"""

import numpy as np
from numba import njit, prange

from server.kernels.cpu_elements import FASTMATH, INNER, all_finite, store, widen
from server.kernels.cpu_keys import mark
from server.kernels.cpu_masses import first_page, length, narrow, own_set, owners_of
from server.kernels.cpu_pools import neutral
from server.kernels.cpu_stretch import MOST, add_values, ask_for
from server.kernels.cpu_tiles import chosen_heads

# Pools have few keys where a row sees so many times more.
FEWER = 4
# What is left of a stock output's size at least, where it is corrected: one bit of its digits less.
KEPT = np.float32(0.5)


@njit(inline="always")
def _written(all_of_them, touched, factors, chosen, pools, live):
    """Fill `live` with the places in `chosen` of heads to write; how many there are."""
    count = 0
    for c in range(chosen.shape[0]):
        changes = touched[chosen[c]] and not neutral(factors[chosen[c]], pools)
        if all_of_them or changes:
            live[count] = c
            count += 1
    return count


@njit(inline="always")
def _visible(position, window):
    """How many keys a row sees."""
    return min(position + 1, window) if window > 0 else position + 1


@njit(inline="always")
def _few(offsets, spans, n, seen):
    """Whether pools have few of so many keys that a row sees."""
    pools = spans.shape[1]
    count = offsets[n, pools] - offsets[n, 0]
    for g in range(pools):
        count += max(spans[n, g, 1] - spans[n, g, 0], 0)
    return FEWER * count <= seen


@njit(inline="always")
def _highest(x):
    """The largest absolute value."""
    top = np.float32(0)
    for d in range(x.shape[0]):
        top = max(top, abs(x[d]))
    return top


@njit(inline="always")
def _add_key(p, key, weight, values, place, least, x):
    """Add the value of a key, if its probability is above `least`; `place` as of `_add_values`."""
    pages, table, kv, first = values
    block = p.shape[2]
    j = key % block
    probability = p[key // block - first, place, j]
    if probability <= least:
        return
    value = pages[table[key // block], kv, 1].reshape(block, -1)[j]
    for d in range(x.shape[0]):
        x[d] += weight * probability * widen(value[d])


@njit(inline="always")
def _correct(row, p, place, values, pools, n, position, window, factors, x):
    """Change a row of the stock output by what pools get more, or less, than the rest does.

    Into `x`; whether it is as exact as a sum of all values would be.
    """
    keys, offsets, weights, spans, above = pools[:5]
    width, rest = spans.shape[1], factors[factors.shape[0] - 1]
    for d in range(x.shape[0]):
        x[d] = rest * widen(row[d])
    before = _highest(x)
    low = max(position - window + 1, 0) if window > 0 else 0
    for g in range(width):
        more = factors[g] - rest
        least = np.float32(-1)
        if above[n, g, 0] >= 0:
            least = above[n, g, 0] + above[n, g, 1] / np.float32(position + 1)
        for key in range(max(spans[n, g, 0], low), min(spans[n, g, 1], position + 1)):
            _add_key(p, key, more, values, place, least, x)
        listed = keys[offsets[n, g] : offsets[n, g + 1]]
        for e in range(np.searchsorted(listed, low), np.searchsorted(listed, position + 1)):
            weight = more
            if weights.shape[0]:
                weight += factors[width + g] * weights[offsets[n, g] + e]
            _add_key(p, np.int64(listed[e]), weight, values, place, least, x)
    return all_finite(x) and _highest(x) >= KEPT * before


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
def _keep(p, count, changed):
    """Leave the probabilities of a page as they are."""
    for j in range(count):
        changed[j] = p[j]


@njit(inline="always")
def _store(sums, chosen, live, whole, row):
    """Write heads, of a row without stock output zeros where not finite; whether all are."""
    finite = True
    for i in range(live.shape[0]):
        if not all_finite(sums[i]):
            finite = False
            if not whole:
                continue
            sums[i] = 0
        store(row[chosen[live[i]]], sums[i])
    return finite


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
    computed,
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
    of = rows, pools, heads, window, touched, factors, computed
    _combine_rows(task, tasks, of, pages, block_table, given, kept, output, finite)


@njit(**INNER)
def _combine_rows(task, tasks, of, pages, block_table, given, kept, output, finite):
    rows, pools, heads, window, touched, factors, computed = of
    token, request, slot, position = rows[:4]
    _, offsets, _, spans, above, sets, prompts = pools
    every, places, (owners, weights, own), changed, sums = given
    ways, marked, (kv_heads, _, group, block) = (offsets, spans), (-1, -1), kept.shape[1:]
    for index in range(task, position.shape[0] * kv_heads, tasks):
        r, kv, width = index // kv_heads, index % kv_heads, spans.shape[1]
        chosen = every[: chosen_heads(heads, slot[r], kv, group, every)]
        whole = computed.shape[0] > 0 and computed[r]
        live = places[: _written(whole, touched[r], factors[r], chosen, width, places)]
        if live.shape[0] == 0:
            continue
        first = first_page(position[r], window, block)
        left, values = 0, (pages, block_table[request[r]], kv, first)
        for i in range(live.shape[0]):
            h = chosen[live[i]]
            n = own_set(sets, prompts, slot[r], position[r], h)
            row, found = output[token[r], h], kept[r, kv]
            few = not whole and _few(offsets, spans, n, _visible(position[r], window))
            if few and _correct(
                row, found, live[i], values, pools, n, position[r], window, factors[r, h], sums[0]
            ):
                store(row, sums[0])
            else:
                live[left] = live[i]
                left += 1
        if left == 0:
            continue
        size = position[r] // block + 1 - first
        ask_for(pages[block_table[request[r], first], kv, 1])
        live = places[:left]
        for i in range(left):
            h = chosen[live[i]]
            n = own_set(sets, prompts, slot[r], position[r], h)
            if marked != (r, n):
                marked = r, n
                mark(ways, n, pools, first * block, owners[: size * block], weights)
            for page in range(size):
                p, at = kept[r, kv, page, live[i]], slice(page * block, (page + 1) * block)
                count = length(position[r], (first + page) * block, block)
                if not touched[r, h]:
                    _keep(p, count, changed[page, i])
                    continue
                who = narrow(p, count, owners[at], above[n], position[r], own)
                _weigh(p, count, who, weights[at], width, factors[r, h], changed[page, i])
        place, table = (first, position[r]), block_table[request[r]]
        _add_values(changed, left, pages, table, kv, place, sums)
        if not _store(sums, chosen, live, whole, output[token[r]]):
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
    computed,
    finite,
):
    """Write what the probabilities in `kept` come to with their factors, with so many threads.

    In `touched` bool `[rows, query_heads]`, and there only selected heads, whose factors change
    anything. Rows in bool `computed` `[rows]`, or empty, have no stock output, and all their
    selected heads are written. A result that is not finite is not written, there zero is, and
    clears the row's flag in `finite`. The rest is as of `cpu_masses.parallel`.
    """
    for thread in prange(threads):
        given = rows, pools, heads, window, kept, touched, factors, computed, finite
        serial(np.int64(thread), threads, output, pages, block_table, *given)
