"""Rescaling of a pool in one pass over the keys, compiled: attention, partials and combination.

Untyped, because numba compiles each function per argument types; shapes are those of
`server.kernels.partials`.
"""

import numpy as np
from numba import njit, prange

from server.kernels.cpu_elements import FASTMATH, power, store, widen
from server.kernels.cpu_lse import fold_pages, log_sum_exp, unpacked_page
from server.kernels.cpu_pools import found_in, measure
from server.kernels.cpu_tiles import buffer_for, chosen_heads, load, seen_by
from server.kernels.cpu_vector import settle
from server.kernels.partials import TILE

# Where less mass than this is left for the other keys, a row has nothing to trade with.
NOTHING_LEFT = np.float32(1e-6)


@njit(inline="always")
def _lerp(factor, mass):
    """`1 + (factor - 1) mass`, exact at factor 1 and to all digits where the mass is nearly 1."""
    if mass < np.float32(0.5):
        return np.float32(1) + mass * (factor - np.float32(1))
    return factor - (factor - np.float32(1)) * (np.float32(1) - mass)


@njit(inline="always")
def _stock(row, x):
    """The output there is."""
    for d in range(x.shape[0]):
        x[d] = widen(row[d])


@njit(inline="always")
def _attention(seen, i, lse, sinks, x):
    """The output of query `i` before anything is rescaled."""
    peak, total = settle(seen[0], seen[1], i)
    share = np.float32(1) / total
    if sinks.shape[0]:
        share *= power(peak + np.log2(total) - lse)
    for d in range(x.shape[0]):
        x[d] = seen[5][i, d] * share


@njit(inline="always")
def _rescaled(x, mass, factor, value):
    """`O' = O / D + (f - 1) / D U` with `D = 1 + (f - 1) m`, in place of `U`; what `m` becomes."""
    rest = np.float32(1) / _lerp(factor, mass)
    extra = factor * rest - rest
    for d in range(x.shape[0]):
        value[d] = rest * x[d] + extra * value[d]
    return factor * rest * mass


@njit(inline="always")
def _finite(x):
    check = np.float32(0)
    for d in range(x.shape[0]):
        check += x[d] * np.float32(0)
    return check == 0


@njit(inline="always")
def _write(tile, chosen, found, seen, sinks, selected, factor, computed, output, done):
    """The outputs of a tile's queries; `tile` is `(tokens, begin, end)`."""
    lse, mass, value, _, x = found
    written, before, after, finite = done
    token, begin, end = tile
    i = -1
    for r in range(begin, end):
        for h in chosen:
            i += 1
            m, row = mass[i], output[token[r], h]
            changed = selected[h] and m != 0
            if computed:
                _attention(seen, i, lse[i], sinks, x)
            elif changed:
                _stock(row, x)
            if changed:
                f = factor[h] if np.float32(1) - m > NOTHING_LEFT else np.float32(1)
                after[r, h] += _rescaled(x, m, f, value[i])
                before[r, h] += m
                written[r, h] += 1
                if _finite(value[i]):
                    store(row, value[i])
                    continue
                finite[r] = False
            if computed:
                store(row, x)


@njit(fastmath=FASTMATH, error_model="numpy", cache=True)
def serial(
    task,
    tasks,
    query,
    stride,
    pages,
    block_table,
    rows,
    pools,
    heads,
    model,
    factor,
    computed,
    output,
    done,
):
    """Every `tasks`-th pair of a tile and a KV head from `task` on; see `parallel`."""
    request, slot, tiles = rows[1], rows[2], rows[4]
    keys, offsets = pools
    kv_heads, head_dim = pages.shape[1], output.shape[2]
    group = output.shape[1] // kv_heads
    queries, seen = buffer_for(query, TILE * group, head_dim), seen_by(TILE * group, head_dim)
    found = found_in(TILE * group, head_dim)
    buffers = unpacked_page(head_dim, pages.shape[3] // head_dim)
    every = np.empty(group, np.int64)
    for index in range(task, (tiles.shape[0] - 1) * kv_heads, tasks):
        kv, begin, end = index % kv_heads, tiles[index // kv_heads], tiles[index // kv_heads + 1]
        s, table = slot[begin], block_table[request[begin]]
        chosen = every[: chosen_heads(heads, s, kv, group, every)]
        if computed[s]:
            chosen = every
            for h in range(group):
                every[h] = kv * group + h
        if chosen.shape[0] == 0:
            continue
        count = load(query, stride, rows, begin, end, chosen, model, queries, seen)
        fold_pages(queries, count, pages, table, kv, head_dim, model[0], seen, buffers, computed[s])
        i = 0
        for _ in range(begin, end):
            for h in chosen:
                found[0][i] = log_sum_exp(seen, i, model[2], h)
                i += 1
        pool = keys[offsets[s, 0] : offsets[s, 1]]
        measure(queries, seen, count, pages, table, kv, pool, model[0], found)
        tile = rows[0], begin, end
        _write(tile, chosen, found, seen, model[2], heads[s], factor[s], computed[s], output, done)


@njit(parallel=True, cache=True)
def parallel(
    threads,
    query,
    stride,
    pages,
    block_table,
    rows,
    pools,
    heads,
    model,
    factor,
    computed,
    output,
    done,
):
    """Multiply the pool's probabilities by `factor` and renormalise the row, in place.

    `query` is flat, tokens `stride` apart, and bfloat16 perhaps in pairs; `rows` is
    `(token, request, slot, position, tiles)`; `pools` is `(keys, offsets)`; `model` is
    `((scale, soft cap, window), slopes, sinks)`; `done` is `(count, before, after, finite)`:
    rewritten outputs and the pool's mass, `[rows, heads]`, and `[rows]`.
    """
    numbers, alibi, sinks = model
    for thread in prange(threads):
        given = (numbers, alibi, sinks)
        serial(
            thread,
            threads,
            query,
            stride,
            pages,
            block_table,
            rows,
            pools,
            heads,
            given,
            factor,
            computed,
            output,
            done,
        )
