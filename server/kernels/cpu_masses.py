"""Probabilities of all keys that single rows see, and what pools have of them, compiled.

The first of two passes, between which the calibrator is asked; `cpu_weighing` is the second. Sums
of values by pool, which `cpu_partials` makes, take a product with the values for each pool, and
that for heads that the calibrator leaves alone too. Here every probability is kept instead, and the
values are read once, for the heads that change, when the factor of each key is known.

Rows share nothing here, and so those of prompts, which share their keys, are for `cpu_partials`.

Untyped, because numba compiles each function per argument types; shapes are those of
`server.kernels.partials`. Logits are in base 2.
"""

import numpy as np
from numba import njit, prange

from server.kernels.cpu_elements import FASTMATH, INNER, power
from server.kernels.cpu_keys import mark
from server.kernels.cpu_llvm import LANES
from server.kernels.cpu_stretch import ask_for, highest, score_many
from server.kernels.cpu_tiles import buffer_for, chosen_heads, load, seen_by
from server.kernels.cpu_vector import LOWEST, QUERIES

_LOWEST = np.float32(LOWEST)


@njit(inline="always")
def first_page(position, window, block):
    """The first page of which a row sees something."""
    return max(position - window + 1, 0) // block if window > 0 else 0


@njit(inline="always")
def length(position, start, block):
    """How many keys a row at `position` sees of a page that begins at `start`, from there on."""
    return min(position - start + 1, block)


@njit(inline="always")
def own_set(sets, prompts, slot, position, h):
    """The set of pools of a row's head."""
    return sets[slot, 0 if position < prompts[slot] else 1, h]


@njit(inline="always")
def narrowed(above):
    """Whether any pool of a set has a threshold."""
    for g in range(above.shape[0]):
        if above[g, 0] >= 0:
            return True
    return False


@njit(inline="always")
def narrow(p, count, owners, above, position, own):
    """Who of the pools has the keys of a page for a row; those not above a threshold, nobody."""
    pools = above.shape[0]
    if not narrowed(above):
        return owners
    for j in range(count):
        own[j] = owners[j]
    for g in range(pools):
        if above[g, 0] < 0:
            continue
        least = above[g, 0] + above[g, 1] / np.float32(position + 1)
        for j in range(count):
            own[j] = np.float32(pools) if own[j] == g and p[j] <= least else own[j]
    return own


@njit(inline="always")
def _score(queries, width, pages, table, kv, place, kept):
    """Products of a row's queries with all keys it sees; `place` is `(first page, position)`."""
    first, position = place
    block = kept.shape[2]
    last = position // block
    for index in range(first, last + 1):
        keys = pages[table[index], kv, 0].reshape(-1, block)
        following = pages[table[min(index + 1, last)], kv, 0].reshape(-1, block)
        count = length(position, index * block, block)
        for at in range(0, width, QUERIES):
            scores = kept[index - first, at:]
            score_many(queries, at, min(QUERIES, width - at), keys, following, count, scores)


@njit(inline="always")
def _ask_for_next(index, rows, heads, pages, block_table, window, block):
    """Have the first keys of a pair of a row and a KV head brought near, if there is such."""
    request, slot, position = rows[1:4]
    kv_heads, r = pages.shape[1], index // pages.shape[1]
    if r >= position.shape[0]:
        return
    kv, group = index % kv_heads, heads.shape[1] // kv_heads
    for h in range(kv * group, (kv + 1) * group):
        if heads[slot[r], h]:
            first = first_page(position[r], window, block)
            ask_for(pages[block_table[request[r], first], kv, 0])
            return


@njit(inline="always")
def _capped(x, cap):
    """`cap * tanh(x / cap)`, which vectorises, as `np.tanh` does not."""
    e = power(np.float32(-2.8853900817779268) * abs(x) / cap)  # 2 log2(e)
    most = cap * (np.float32(1) - e) / (np.float32(1) + e)
    return most if x > 0 else -most


@njit(inline="always")
def _shape(x, start, i, seen, numbers):
    """Logits of a page from products, those of hidden keys the lowest, up to a whole vector."""
    (scale, cap, _), positions, first, slopes = numbers, seen[2], seen[3], seen[4]
    count = length(positions[i], start, x.shape[0])
    slope, before = slopes[i], np.float32(start - positions[i])
    if cap > 0:
        for j in range(count):
            x[j] = _capped(x[j] * scale, cap) + slope * (before + np.float32(j))
    else:
        for j in range(count):
            x[j] = x[j] * scale + slope * (before + np.float32(j))
    for j in range(first[i] - start):
        x[j] = _LOWEST
    for j in range(count, -(-count // LANES) * LANES):
        x[j] = _LOWEST
    return highest(x, count)


@njit(inline="always")
def _normalise(kept, c, first, seen, numbers, sink, mass):
    """Products of a head to probabilities; into its mass that of `sink`, a learned logit."""
    block, position, peak = kept.shape[2], seen[2][c], sink
    for n in range(position // block + 1 - first):
        peak = max(peak, _shape(kept[n, c], (first + n) * block, c, seen, numbers))
    alone = power(sink - peak) if sink > _LOWEST else np.float32(0)
    total = alone
    for n in range(position // block + 1 - first):
        x = kept[n, c]
        for j in range(length(position, (first + n) * block, block)):
            x[j] = power(x[j] - peak)
            total += x[j]
    share = np.float32(1) / total
    for n in range(position // block + 1 - first):
        x = kept[n, c]
        for j in range(length(position, (first + n) * block, block)):
            x[j] *= share
    # Where one probability is NaN all masses have to be, those of empty pools too.
    mass[:] = share * np.float32(0)
    mass[mass.shape[0] - 1] += alone * share


@njit(inline="always")
def _add(p, count, own, weights, pools, mass):
    """Add the probabilities of a page to the masses of those who have them."""
    rest = mass.shape[0] - 1
    for g in range(pools + 1):
        total = np.float32(0)
        for j in range(count):
            total += p[j] if own[j] == g else np.float32(0)
        mass[g if g < pools else rest] += total
    for g in range(rest - pools):
        total = np.float32(0)
        for j in range(count):
            total += p[j] * weights[j] if own[j] == g else np.float32(0)
        mass[pools + g] += total


@njit(inline="always")
def owners_of(most, block):
    """Buffers: owner and weight of each key of a row, and owners after thresholds of a page."""
    return (
        np.empty(most * block, np.float32),
        np.empty(most * block, np.float32),
        np.empty(block, np.float32),
    )


@njit(fastmath=FASTMATH, error_model="numpy", cache=True)
def serial(task, tasks, query, stride, pages, block_table, rows, pools, heads, model, kept, m):
    """Every `tasks`-th pair of a row and a KV head from `task` on; see `parallel`."""
    _, _, most, group, block = kept.shape
    queries = buffer_for(query, group, pages.shape[3] // block)
    given = seen_by(group, 0), np.empty(group, np.int64), owners_of(most, block)
    of = query, stride, rows, pools, heads, model
    _measure_rows(task, tasks, of, pages, block_table, queries, given, kept, m)


@njit(**INNER)
def _measure_rows(task, tasks, of, pages, block_table, queries, given, kept, m):
    query, stride, rows, pools, heads, model = of
    request, slot, position = rows[1:4]
    _, offsets, _, spans, above, sets, prompts = pools
    seen, every, (owners, weights, own) = given
    (numbers, _, sinks), ways, marked = model, (offsets, spans), (-1, -1)
    kv_heads, (group, block) = kept.shape[1], kept.shape[3:]
    for index in range(task, position.shape[0] * kv_heads, tasks):
        r, kv = index // kv_heads, index % kv_heads
        m[r, kv * group : (kv + 1) * group] = 0
        chosen = every[: chosen_heads(heads, slot[r], kv, group, every)]
        if chosen.shape[0] == 0:
            continue
        load(query, stride, rows, r, r + 1, chosen, model, queries, seen)
        first = first_page(position[r], numbers[2], block)
        table, found, size = block_table[request[r]], kept[r, kv], position[r] // block + 1 - first
        _score(queries, chosen.shape[0], pages, table, kv, (first, position[r]), found)
        _ask_for_next(index + tasks, rows, heads, pages, block_table, numbers[2], block)
        for c in range(chosen.shape[0]):
            h = chosen[c]
            n, mass = own_set(sets, prompts, slot[r], position[r], h), m[r, h]
            if marked != (r, n):
                marked = r, n
                mark(ways, n, pools, first * block, owners[: size * block], weights)
            sink = sinks[h] if sinks.shape[0] else _LOWEST
            _normalise(found, c, first, seen, numbers, sink, mass)
            for page in range(size):
                p, count = found[page, c], length(position[r], (first + page) * block, block)
                at = slice(page * block, (page + 1) * block)
                who = narrow(p, count, owners[at], above[n], position[r], own)
                _add(p, count, who, weights[at], spans.shape[1], mass)


@njit(parallel=True, cache=True)
def parallel(threads, query, stride, pages, block_table, rows, pools, heads, model, kept, m):
    """Fill every element of `m`, and of `kept` what rows see, with so many threads.

    `kept` is float32 `[rows, kv_heads, pages, group, block]`, by page from the first that a row
    sees something of, and by head among the selected ones of the KV head. `query` is flat, tokens
    `stride` apart, and bfloat16 perhaps in pairs; `rows` is `(token, request, slot, position,
    tiles)`; `pools` is `(keys, offsets, weights, spans, above, sets, prompts)`; `model` is
    `((scale, soft cap, window), slopes, sinks)`.
    """
    numbers, alibi, sinks = model
    for thread in prange(threads):
        given = (numbers, alibi, sinks)
        serial(
            np.int64(thread),
            threads,
            query,
            stride,
            pages,
            block_table,
            rows,
            pools,
            heads,
            given,
            kept,
            m,
        )
