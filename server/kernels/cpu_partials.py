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

from server.kernels.cpu_elements import FASTMATH, INNER, power
from server.kernels.cpu_fold import fold_pages, log_sum_exp, many, unpacked_page
from server.kernels.cpu_keys import measure, raise_peak
from server.kernels.cpu_tiles import buffer_for, chosen_heads, load, seen_by
from server.kernels.cpu_vector import LOWEST, settle
from server.kernels.partials import TILE

_LOWEST = np.float32(LOWEST)


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
            starts[kinds] = c
            for g in range(offsets.shape[1]):
                bounds[kinds, g] = offsets[n, g]
            for g in range(spans.shape[1]):
                reach[kinds, g, 0], reach[kinds, g, 1] = spans[n, g, 0], spans[n, g, 1]
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
def _divide(part, pools, sinks, peak, m, u):
    """Divide all sums by the row's total; a learned sink, which has no value, is of the rest."""
    begin, end, heads = part
    rest, i = m.shape[2] - 1, 0
    for r in range(begin, end):
        for h in heads:
            if sinks.shape[0]:
                raise_peak(sinks[h], i, peak, m[r, h], u[r, h])
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
    """Buffers: bounds, spans, first head and set of each kind; heads; edges of a tile."""
    return (
        np.empty((group, pools + 1), np.int32),
        np.empty((group, pools, 2), np.int32),
        np.empty(group + 1, np.int64),
        np.empty(group, np.int64),
        np.empty(group, np.int64),
        np.empty(3, np.int64),
    )


@njit(inline="always")
def _sums_by(limit, head_dim, block, columns):
    """Buffers: a peak per query, a key; of a page's keys owners, weights, logits, powers, owners
    after thresholds, and powers by column."""
    return (
        np.empty(limit, np.float32),
        np.empty(head_dim, np.float32),
        np.empty(block, np.float32),
        np.empty(block, np.float32),
        np.empty(block, np.float32),
        np.empty(block, np.float32),
        np.empty(block, np.float32),
        np.empty((columns, block), np.float32),
    )


@njit(fastmath=FASTMATH, error_model="numpy", cache=True)
def serial(task, tasks, query, stride, pages, block_table, rows, pools, heads, model, lse, m, u):
    """Every `tasks`-th pair of a tile and a KV head from `task` on; see `parallel`."""
    kv_heads, head_dim, columns = pages.shape[1], u.shape[3], pools[1].shape[1] - 1
    group, block = m.shape[1] // kv_heads, pages.shape[3] // head_dim
    queries, seen = buffer_for(query, TILE * group, head_dim), seen_by(TILE * group, head_dim)
    buffers = unpacked_page(head_dim, block, group), _pools_in(group, columns)
    given = lse, *_sums_by(TILE * group, head_dim, block, m.shape[2])
    of = query, stride, rows, pools, heads, model
    _divide_tiles(task, tasks, of, pages, block_table, queries, seen, buffers, given, m, u)


@njit(**INNER)
def _divide_tiles(task, tasks, of, pages, block_table, queries, seen, buffers, given, m, u):
    query, stride, rows, pools, heads, model = of
    request, slot, position, tiles = rows[1:]
    offsets, spans, sets, prompts = pools[1], pools[3], pools[5], pools[6]
    kv_heads, columns, weigh = pages.shape[1], offsets.shape[1] - 1, u.shape[2] > 0
    bounds, reach, starts, own_sets, every, edges = buffers[1]
    group, limit = every.shape[0], many(pages.shape[3] // u.shape[3])
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
            # Pooled keys are not of the rest: with the lowest logit, nothing of them is.
            seen[6][:count] = _LOWEST
            hidden = pools[0], bounds[:kinds], reach[:kinds], limit
            fold_pages(queries, count, pages, table, kv, hidden, model[0], seen, buffers[0], weigh)
            if not weigh:
                _write_log_sum_exps(seen, part, model[2], given[0])
                continue
            _take_rest(seen, part, given[1], m, u)
            for n in range(kinds):
                own_sets[n] = own[chosen[starts[n]]]
            ways = bounds[:kinds], reach[:kinds], starts, own_sets[:kinds]
            measure(
                queries, count, seen, part, pages, table, kv, ways, pools, model[0], given, m, u
            )
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
