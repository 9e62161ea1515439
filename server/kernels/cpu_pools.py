"""Pool partials, combination and rescaling on rows whose log-sum-exp is known, compiled.

Untyped, because numba compiles each function per argument types; shapes are those of
`server.kernels.partials`. Log-sum-exps and logits are in base 2.
"""

import numpy as np
from numba import njit, prange

from server.kernels.cpu_elements import FASTMATH, chosen_heads, power, store, widen
from server.kernels.partials import TILE

# Where less mass than this is left for the other keys, a row has nothing to trade with.
NOTHING_LEFT = np.float32(1e-6)


@njit(inline="always")
def _shape(score, soft_cap, slope, distance):
    if soft_cap > 0:
        score = soft_cap * np.tanh(score / soft_cap)
    return score + slope * distance


@njit(inline="always")
def _load(query, stride, rows, begin, end, chosen, model, lse, tile):
    """Queries of a tile in float32, and what they see of their keys; how many there are."""
    token, position = rows[0], rows[3]
    q, total, positions, first, slopes = tile
    (_, _, window), alibi, _ = model
    head_dim, i = q.shape[1], 0
    for r in range(begin, end):
        for h in chosen:
            at = token[r] * stride + h * head_dim
            for d in range(head_dim):
                q[i, d] = widen(query[at + d])
            total[i] = lse[r, h]
            positions[i] = position[r]
            first[i] = max(position[r] - window + 1, 0) if window > 0 else 0
            slopes[i] = alibi[h] if alibi.shape[0] else np.float32(0)
            i += 1
    return i


@njit(fastmath=FASTMATH, error_model="numpy", cache=True)
def _pool(tile, count, pages, table, kv, keys, numbers, found):
    """Mass and value sum of `keys` for each query, into `found`."""
    q, lse, positions, first, slopes = tile
    mass, value, k, v = found
    scale, cap, _ = numbers
    head_dim = q.shape[1]
    block = pages.shape[3] // head_dim
    for i in range(count):
        mass[i] = 0
        for d in range(head_dim):
            value[i, d] = 0
    for key in keys:
        if key > positions[count - 1]:
            break
        page, j = table[key // block], key % block
        for d in range(head_dim):
            k[d] = widen(pages[page, kv, 0, d * block + j])
            v[d] = widen(pages[page, kv, 1, j * head_dim + d])
        for i in range(count):
            if key < first[i] or key > positions[i]:
                continue
            score = np.float32(0)
            for d in range(head_dim):
                score += q[i, d] * k[d]
            x = _shape(score * scale, cap, slopes[i], np.float32(key - positions[i])) - lse[i]
            p = power(np.float32(0) if x > 0 else x)
            mass[i] += p
            for d in range(head_dim):
                value[i, d] += p * v[d]


@njit(inline="always")
def _workspace(limit, head_dim):
    """Buffers for a tile's queries, and for what is found about them."""
    tile = (
        np.empty((limit, head_dim), np.float32),  # queries
        np.empty(limit, np.float32),  # log-sum-exp
        np.empty(limit, np.int64),  # position
        np.empty(limit, np.int64),  # first visible key
        np.empty(limit, np.float32),  # ALiBi slope
    )
    found = (
        np.empty(limit, np.float32),  # mass
        np.empty((limit, head_dim), np.float32),  # value sum
        np.empty(head_dim, np.float32),  # a key
        np.empty(head_dim, np.float32),  # its value
    )
    return tile, found


@njit(fastmath=FASTMATH, error_model="numpy", cache=True)
def partials_serial(
    task, tasks, query, stride, pages, block_table, rows, pools, heads, model, lse, mass, value
):
    """Every `tasks`-th pair of a tile and a KV head from `task` on; see `partials_parallel`."""
    _, request, slot, _, tiles = rows
    keys, offsets = pools
    kv_heads, head_dim = pages.shape[1], value.shape[3]
    group = lse.shape[1] // kv_heads
    tile, found = _workspace(TILE * group, head_dim)
    every = np.empty(group, np.int64)
    for index in range(task, (tiles.shape[0] - 1) * kv_heads, tasks):
        kv, begin, end = index % kv_heads, tiles[index // kv_heads], tiles[index // kv_heads + 1]
        s = slot[begin]
        mass[begin:end, kv * group : (kv + 1) * group] = 0
        value[begin:end, kv * group : (kv + 1) * group] = 0
        chosen = every[: chosen_heads(heads, s, kv, group, every)]
        if chosen.shape[0] == 0:
            continue
        count = _load(query, stride, rows, begin, end, chosen, model, lse, tile)
        table = block_table[request[begin]]
        for g in range(offsets.shape[1] - 1):
            pool = keys[offsets[s, g] : offsets[s, g + 1]]
            _pool(tile, count, pages, table, kv, pool, model[0], found)
            i = 0
            for r in range(begin, end):
                for h in chosen:
                    mass[r, h, g] = found[0][i]
                    value[r, h, g] = found[1][i]
                    i += 1


@njit(parallel=True, cache=True)
def partials_parallel(
    threads, query, stride, pages, block_table, rows, pools, heads, model, lse, mass, value
):
    """Fill every element of `mass` and `value`, with so many threads.

    `query` is flat, tokens `stride` apart; `rows` is `(token, request, slot, position, tiles)`;
    `pools` is `(keys, offsets)`; `model` is `((scale, soft cap, window), slopes, sinks)`.
    """
    numbers, alibi, sinks = model
    for thread in prange(threads):
        given = (numbers, alibi, sinks)
        partials_serial(
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
            lse,
            mass,
            value,
        )


@njit(fastmath=FASTMATH, error_model="numpy", cache=True)
def combine_serial(task, tasks, output, token, heads, value, factors, rest, finite):
    """Every `tasks`-th row from `task` on; see `combine_parallel`."""
    x = np.empty(output.shape[2], np.float32)
    for r in range(task, token.shape[0], tasks):
        for h in range(output.shape[1]):
            if not heads[r, h]:
                continue
            row, check = output[token[r], h], np.float32(0)
            for d in range(row.shape[0]):
                x[d] = rest[r, h] * widen(row[d])
            for g in range(value.shape[2]):
                factor = factors[r, h, g] - rest[r, h]
                for d in range(row.shape[0]):
                    x[d] += factor * value[r, h, g, d]
            for d in range(row.shape[0]):
                check += x[d] * np.float32(0)
            if check == 0:
                store(row, x)
            else:
                finite[r] = False


@njit(parallel=True, cache=True)
def combine_parallel(threads, output, token, heads, value, factors, rest, finite):
    """`O' = c_rest O + sum_g (c_g - c_rest) U_g` on the selected heads, in place.

    A result that is not finite is not written, and clears the row's flag in `finite`.
    """
    for thread in prange(threads):
        combine_serial(thread, threads, output, token, heads, value, factors, rest, finite)


@njit(inline="always")
def _lerp(factor, mass):
    """`1 + (factor - 1) mass`, exact at factor 1 and to all digits where the mass is nearly 1."""
    if mass < np.float32(0.5):
        return np.float32(1) + mass * (factor - np.float32(1))
    return factor - (factor - np.float32(1)) * (np.float32(1) - mass)


@njit(inline="always")
def _rescale(token, begin, end, chosen, found, factor, output, done):
    """`O' = O / D + (f - 1) / D U` with `D = 1 + (f - 1) m`, for the queries of a tile."""
    mass, value, _, x = found
    written, before, after, finite = done
    i = -1
    for r in range(begin, end):
        for h in chosen:
            i += 1
            m, row = mass[i], output[token[r], h]
            if m == 0:
                continue
            f = factor[h] if np.float32(1) - m > NOTHING_LEFT else np.float32(1)
            rest = np.float32(1) / _lerp(f, m)
            extra, check = f * rest - rest, np.float32(0)
            for d in range(x.shape[0]):
                x[d] = rest * widen(row[d]) + extra * value[i, d]
                check += x[d] * np.float32(0)
            if check == 0:
                store(row, x)
            else:
                finite[r] = False
            written[r, h] += 1
            before[r, h] += m
            after[r, h] += f * rest * m


@njit(fastmath=FASTMATH, error_model="numpy", cache=True)
def rescale_serial(
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
    lse,
    factor,
    output,
    done,
):
    """Every `tasks`-th pair of a tile and a KV head from `task` on; see `rescale_parallel`."""
    request, slot, tiles = rows[1], rows[2], rows[4]
    keys, offsets = pools
    kv_heads, head_dim = pages.shape[1], output.shape[2]
    group = output.shape[1] // kv_heads
    tile, found = _workspace(TILE * group, head_dim)
    every = np.empty(group, np.int64)
    for index in range(task, (tiles.shape[0] - 1) * kv_heads, tasks):
        kv, begin, end = index % kv_heads, tiles[index // kv_heads], tiles[index // kv_heads + 1]
        s = slot[begin]
        chosen = every[: chosen_heads(heads, s, kv, group, every)]
        if chosen.shape[0] == 0:
            continue
        count = _load(query, stride, rows, begin, end, chosen, model, lse, tile)
        pool = keys[offsets[s, 0] : offsets[s, 1]]
        table = block_table[request[begin]]
        _pool(tile, count, pages, table, kv, pool, model[0], found)
        _rescale(rows[0], begin, end, chosen, found, factor[s], output, done)


@njit(parallel=True, cache=True)
def rescale_parallel(
    threads, query, stride, pages, block_table, rows, pools, heads, model, lse, factor, output, done
):
    """Multiply the pool's probabilities by `factor` and renormalise the row, in place.

    `O' = O / D + (f - 1) / D U` with `D = 1 + (f - 1) m`. `done` is `(count, before, after,
    finite)`: rewritten outputs and the pool's mass, `[rows, heads]`, and `[rows]`.
    """
    numbers, alibi, sinks = model
    for thread in prange(threads):
        given = (numbers, alibi, sinks)
        rescale_serial(
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
            lse,
            factor,
            output,
            done,
        )
