"""Rescaling of a pool in one pass over the keys, compiled: attention, partials and combination.

Untyped, because numba compiles each function per argument types; shapes are those of
`server.kernels.partials`.
"""

import numpy as np
from numba import njit, prange

from server.kernels.cpu_elements import FASTMATH, INNER, all_finite, power, store, widen
from server.kernels.cpu_fold import fold_pages, log_sum_exp, unpacked_page
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
def _corrected(row, mass, factor, value, x):
    """`O' = O / D + (f - 1) / D U` with `D = 1 + (f - 1) m`; what `m` becomes."""
    f = factor if np.float32(1) - mass > NOTHING_LEFT else np.float32(1)
    rest = np.float32(1) / _lerp(f, mass)
    extra = f * rest - rest
    for d in range(x.shape[0]):
        x[d] = rest * widen(row[d]) + extra * value[d]
    return f * rest * mass


@njit(inline="always")
def _correct(tile, chosen, found, factor, output, done):
    """Rewrite the stock outputs of a tile's queries; `tile` is `(tokens, begin, end)`."""
    _, mass, value, _, x = found
    written, before, after, finite = done
    token, begin, end = tile
    i = -1
    for r in range(begin, end):
        for h in chosen:
            i += 1
            if mass[i] == 0:
                continue
            row = output[token[r], h]
            after[r, h] += _corrected(row, mass[i], factor[h], value[i], x)
            before[r, h] += mass[i]
            written[r, h] += 1
            if all_finite(x):
                store(row, x)
            else:
                finite[r] = False


@njit(inline="always")
def _set_bias(tile, chosen, selected, factor, bias, done):
    """A factor on probabilities is a bias on logits; one that has none fails its row."""
    i = -1
    for r in range(tile[1], tile[2]):
        for h in chosen:
            i += 1
            bias[i] = np.log2(factor[h]) if selected[h] else np.float32(0)
            if bias[i] * np.float32(0) != 0:
                bias[i] = 0
                done[3][r] = False


@njit(inline="always")
def _attention(seen, i, lse, sinks, x):
    """The output of query `i`."""
    peak, total = settle(seen[0], seen[1], i)
    share = np.float32(1) / total
    if sinks.shape[0]:
        share *= power(peak + np.log2(total) - lse)
    for d in range(x.shape[0]):
        x[d] = seen[5][i, d] * share


@njit(inline="always")
def _compute(tile, chosen, found, seen, sinks, selected, factor, output, done):
    """Write the outputs of a tile's queries, whose logits were biased."""
    lse, mass, _, _, x = found
    written, before, after, finite = done
    token, begin, end = tile
    i = -1
    for r in range(begin, end):
        for h in chosen:
            i += 1
            _attention(seen, i, lse[i], sinks, x)
            store(output[token[r], h], x)
            if not selected[h] or mass[i] == 0:
                continue
            if not all_finite(x):
                finite[r] = False
            f, m = factor[h], mass[i]
            after[r, h] += m
            before[r, h] += m / (f - (f - np.float32(1)) * m)
            written[r, h] += 1


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
    head_dim = output.shape[2]
    group = output.shape[1] // pages.shape[1]
    queries, seen = buffer_for(query, TILE * group, head_dim), seen_by(TILE * group, head_dim)
    found = found_in(TILE * group, head_dim)
    buffers = unpacked_page(head_dim, pages.shape[3] // head_dim, 1)
    every, span = np.empty(group, np.int64), np.zeros((1, 1, 2), np.int32)
    of, given = (query, stride, rows, pools, heads, model, factor, computed), (found, every, span)
    _rescale_tiles(task, tasks, of, pages, block_table, queries, seen, buffers, given, output, done)


@njit(**INNER)
def _rescale_tiles(
    task, tasks, of, pages, block_table, queries, seen, buffers, given, output, done
):
    query, stride, rows, pools, heads, model, factor, computed = of
    request, slot, tiles = rows[1], rows[2], rows[4]
    keys, offsets = pools
    found, every, span = given
    kv_heads, group = pages.shape[1], every.shape[0]
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
        tile, pool = (rows[0], begin, end), keys[offsets[s, 0] : offsets[s, 1]]
        # Where the stock output is corrected, plain logits are what it takes.
        biased = keys, offsets[s : s + 1] if computed[s] else offsets[:0], span, np.int64(1 << 40)
        if computed[s]:
            _set_bias(tile, chosen, heads[s], factor[s], seen[6], done)
        fold_pages(queries, count, pages, table, kv, biased, model[0], seen, buffers, computed[s])
        for i in range(count):
            found[0][i] = log_sum_exp(seen, i, model[2], chosen[i % chosen.shape[0]])
        measure(queries, seen, count, pages, table, kv, pool, model[0], found, not computed[s])
        if computed[s]:
            _compute(tile, chosen, found, seen, model[2], heads[s], factor[s], output, done)
        else:
            _correct(tile, chosen, found, factor[s], output, done)


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
    """Multiply the pool's probabilities by `factor` and renormalise the row.

    In place where `computed` is False; where it is True nothing in `output` is read.
    `query` is flat, tokens `stride` apart, and bfloat16 perhaps in pairs; `rows` is
    `(token, request, slot, position, tiles)`; `pools` is `(keys, offsets)`; `model` is
    `((scale, soft cap, window), slopes, sinks)`; `done` is `(count, before, after, finite)`:
    rewritten outputs and the pool's mass, `[rows, heads]`, and `[rows]`.
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
            factor,
            computed,
            output,
            done,
        )
