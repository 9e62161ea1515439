"""Attention rows divided into pools and the rest, over the paged cache, compiled.

The rest is summed by itself, over the keys that no pool has, and not as what the pools leave of
the whole: where they have nearly all of a row that would be a difference of nearly equal numbers.
Sums are of `2^(x - peak)`, with one running peak per query, and are divided by their total at the
end.

Untyped, because numba compiles each function per argument types; shapes are those of
`server.kernels.partials`. Log-sum-exps and logits are in base 2.
"""

import numpy as np
from numba import njit, prange

from server.kernels.cpu_elements import FASTMATH, power, widen
from server.kernels.cpu_fold import fold_pages, log_sum_exp, unpacked_page
from server.kernels.cpu_pools import shape
from server.kernels.cpu_tiles import buffer_for, chosen_heads, dot, load, load_key, seen_by
from server.kernels.cpu_vector import HEADROOM, LOWEST, settle
from server.kernels.partials import TILE

_HEADROOM = np.float32(HEADROOM)
_LOWEST = np.float32(LOWEST)


@njit(inline="always")
def _raise_peak(x, i, peak, mass, value):
    """Scale what was summed of query `i` where the logit `x` lies far above its peak; rare."""
    if x > peak[i] + _HEADROOM:
        scale = power(peak[i] - x)
        peak[i] = x
        for column in range(mass.shape[0]):
            mass[column] *= scale
            for d in range(value.shape[1]):
                value[column, d] *= scale


@njit(inline="always")
def _add(p, v, mass, value, column):
    mass[column] += p
    for d in range(v.shape[0]):
        value[column, d] += p * v[d]


@njit(inline="always")
def _kinds(sets, chosen, count, offsets, spans, kind, bounds, reach, starts):
    """Give each query the kind of its head: neighbouring heads of one set are of one kind.

    Fills `bounds` and `reach` with the pools of each kind, and `starts` with the first of its heads
    among those chosen. Returns how many kinds there are.
    """
    kinds, width = 0, chosen.shape[0]
    for c in range(width):
        n = sets[chosen[c]]
        if c == 0 or n != sets[chosen[c - 1]]:
            bounds[kinds], reach[kinds], starts[kinds] = offsets[n], spans[n], c
            kinds += 1
        for i in range(c, count, width):
            kind[i] = kinds - 1
    starts[kinds] = width
    return kinds


@njit(inline="always")
def _write_log_sum_exps(seen, part, sinks, lse):
    begin, end, heads = part
    i = 0
    for r in range(begin, end):
        for h in heads:
            lse[r, h] = log_sum_exp(seen, i, sinks, h)
            i += 1


@njit(inline="always")
def _take_rest(seen, part, peak, m, u):
    """What `fold_pages` summed, into the last column; `part` is `(begin, end, heads)`."""
    begin, end, heads = part
    rest, i = m.shape[2] - 1, 0
    for r in range(begin, end):
        for h in heads:
            highest, total = settle(seen[0], seen[1], i)
            peak[i] = _LOWEST
            # Sums of hidden keys alone are of no use. A NaN has to show in the result.
            if highest > np.float32(0.5) * _LOWEST or total != total:
                peak[i] = highest
                m[r, h, rest] = total
                for d in range(u.shape[3]):
                    u[r, h, rest, d] = seen[5][i, d]
            i += 1


@njit(inline="always")
def _measure(queries, seen, kind, pages, table, kv, pool, numbers, given, m, u):
    """Add a pool's keys to the sums of the queries of a kind.

    `kind` is `(begin, end, heads, first and last + 1 of its heads)`; `pool` is `(column, weighted
    column, keys, weights, span, above)`. Keys that are not above the threshold count with the rest.
    """
    begin, end, heads, low, high = kind
    column, beside, keys, weights, span, above = pool
    lse, peak, k, v = given
    scale, cap, _ = numbers
    positions, first, slopes = seen[2:5]
    width, block = heads.shape[0], pages.shape[3] // v.shape[0]
    final = positions[(end - begin) * width - 1]
    start, stop = max(span[0], first[0]), min(span[1], final + 1)
    within = max(stop - start, 0)
    for n in range(within + keys.shape[0]):
        key = start + n if n < within else np.int64(keys[n - within])
        if key > final:
            break
        page, j = table[key // block], key % block
        load_key(queries, pages[page, kv, 0], j, block, k)
        for d in range(v.shape[0]):
            v[d] = widen(pages[page, kv, 1, j * v.shape[0] + d])
        weight = weights[n - within] if n >= within and weights.shape[0] else np.float32(0)
        for r in range(begin, end):
            for c in range(low, high):
                i, h = (r - begin) * width + c, heads[c]
                if key < first[i] or key > positions[i]:
                    continue
                distance = np.float32(key - positions[i])
                x = shape(dot(queries, i, k) * scale, cap, slopes[i], distance)
                _raise_peak(x, i, peak, m[r, h], u[r, h])
                p = power(x - peak[i])
                least = above[0] + above[1] / np.float32(positions[i] + 1)
                counts = least < 0 or not power(min(x - lse[r, h], np.float32(0))) <= least
                _add(p, v, m[r, h], u[r, h], column if counts else m.shape[2] - 1)
                if counts and weight != 0:
                    _add(weight * p, v, m[r, h], u[r, h], beside)


@njit(inline="always")
def _divide(part, pools, sinks, peak, m, u):
    """Divide all sums by the row's total; a learned sink, which has no value, is of the rest."""
    begin, end, heads = part
    rest, i = m.shape[2] - 1, 0
    for r in range(begin, end):
        for h in heads:
            if sinks.shape[0]:
                _raise_peak(sinks[h], i, peak, m[r, h], u[r, h])
                m[r, h, rest] += power(sinks[h] - peak[i])
            total = m[r, h, rest]
            for g in range(pools):
                total += m[r, h, g]
            for column in range(m.shape[2]):
                m[r, h, column] /= total
                for d in range(u.shape[3]):
                    u[r, h, column, d] /= total
            i += 1


@njit(inline="always")
def _edges(begin, end, position, prompt, edges):
    """Where a tile's prompt rows and its generated rows begin, and where they end."""
    edges[0], edges[2] = begin, end
    edges[1] = begin + min(max(prompt - position[begin], 0), end - begin)


@njit(inline="always")
def _pools_in(group, pools):
    """Buffers: bounds, spans and first head of each kind."""
    return (
        np.empty((group, pools + 1), np.int32),
        np.empty((group, pools, 2), np.int32),
        np.empty(group + 1, np.int64),
    )


@njit(fastmath=FASTMATH, error_model="numpy", cache=True)
def serial(task, tasks, query, stride, pages, block_table, rows, pools, heads, model, lse, m, u):
    """Every `tasks`-th pair of a tile and a KV head from `task` on; see `parallel`."""
    request, slot, position, tiles = rows[1:]
    keys, offsets, weights, spans, above, sets, prompts = pools
    kv_heads, head_dim, columns = pages.shape[1], u.shape[3], offsets.shape[1] - 1
    group, weighted = m.shape[1] // kv_heads, m.shape[2] - 1 - columns
    weigh = u.shape[2] > 0
    queries, seen = buffer_for(query, TILE * group, head_dim), seen_by(TILE * group, head_dim)
    buffers = unpacked_page(head_dim, pages.shape[3] // head_dim, group)
    bounds, reach, starts = _pools_in(group, columns)
    k, v = np.empty(head_dim, np.float32), np.empty(head_dim, np.float32)
    given = lse, np.empty(TILE * group, np.float32), k, v
    every, edges = np.empty(group, np.int64), np.empty(3, np.int64)
    for index in range(task, (tiles.shape[0] - 1) * kv_heads, tasks):
        kv, at, end = index % kv_heads, tiles[index // kv_heads], tiles[index // kv_heads + 1]
        m[at:end, kv * group : (kv + 1) * group] = 0
        u[at:end, kv * group : (kv + 1) * group] = 0
        s, table = slot[at], block_table[request[at]]
        chosen = every[: chosen_heads(heads, s, kv, group, every)]
        _edges(at, end, position, prompts[s], edges)
        for half in range(2):
            begin, stop, own = edges[half], edges[half + 1], sets[s, half]
            if begin == stop or chosen.shape[0] == 0:
                continue
            part = begin, stop, chosen
            count = load(query, stride, rows, begin, stop, chosen, model, queries, seen)
            kinds = _kinds(own, chosen, count, offsets, spans, seen[7], bounds, reach, starts)
            # Pooled keys are not of the rest: there is next to nothing of them in its sums.
            seen[6][:count] = _LOWEST
            hidden = keys, bounds[:kinds], reach[:kinds]
            fold_pages(queries, count, pages, table, kv, hidden, model[0], seen, buffers, weigh)
            if not weigh:
                _write_log_sum_exps(seen, part, model[2], lse)
                continue
            _take_rest(seen, part, given[1], m, u)
            for n in range(kinds):
                kind, first = (*part, starts[n], starts[n + 1]), own[chosen[starts[n]]]
                for g in range(columns):
                    a, b = bounds[n, g], bounds[n, g + 1]
                    pool = g, g + weighted, keys[a:b], weights[a:b], reach[n, g], above[first, g]
                    _measure(queries, seen, kind, pages, table, kv, pool, model[0], given, m, u)
            _divide(part, columns, model[2], given[1], m, u)


@njit(parallel=True, cache=True)
def parallel(
    threads, query, stride, pages, block_table, rows, pools, heads, model, lse, mass, value
):
    """Fill every element of `mass` and `value`, with so many threads; or `lse`, without values.

    `query` is flat, tokens `stride` apart, and bfloat16 perhaps in pairs; `rows` is `(token,
    request, slot, position, tiles)`; `pools` is `(keys, offsets, weights, spans, above, sets,
    prompts)`; `model` is `((scale, soft cap, window), slopes, sinks)`. `lse` is read where there
    are thresholds. With no columns in `value` it is filled, and only where `heads` is set.
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
            lse,
            mass,
            value,
        )
