"""Partials of all pools over the paged cache, compiled.

Untyped, because numba compiles each function per argument types; shapes are those of
`server.kernels.partials`. Log-sum-exps and logits are in base 2.
"""

import numpy as np
from numba import njit, prange

from server.kernels.cpu_elements import FASTMATH, power, widen
from server.kernels.cpu_pools import shape
from server.kernels.cpu_tiles import buffer_for, chosen_heads, dot, load, load_key, seen_by
from server.kernels.partials import TILE


@njit(inline="always")
def _found_in(limit, head_dim, sides):
    """Buffers: `(log-sum-exp, probability)` of each query, `(mass, value sum)` of each side and
    query, a key and its value. The sides of a pool are without and with weights."""
    return (
        np.empty(limit, np.float32),
        np.empty(limit, np.float32),
        np.empty((sides, limit), np.float32),
        np.empty((sides, limit, head_dim), np.float32),
        np.empty(head_dim, np.float32),
        np.empty(head_dim, np.float32),
    )


@njit(inline="always")
def _probabilities(queries, seen, count, key, numbers, above, found):
    """Probability of a key for each query, 0 where it does not count; whether it does anywhere."""
    lse, probability, _, _, k, _ = found
    scale, cap, _ = numbers
    positions, first, slopes = seen[2:5]
    some = False
    for i in range(count):
        probability[i] = 0
        if key < first[i] or key > positions[i]:
            continue
        distance = np.float32(key - positions[i])
        x = shape(dot(queries, i, k) * scale, cap, slopes[i], distance) - lse[i]
        p = power(np.float32(0) if x > 0 else x)
        # NaN has to show in the result.
        if not p <= above[0] + above[1] / np.float32(positions[i] + 1):
            probability[i] = p
            some = True
    return some


@njit(inline="always")
def _measure(queries, seen, count, pages, table, kv, pool, numbers, found):
    """Mass and value sum of a pool for each query; `pool` is `(keys, weights, span, above)`."""
    keys, weights, span, above = pool
    positions, first = seen[2:4]
    _, probability, mass, value, k, v = found
    head_dim = v.shape[0]
    block = pages.shape[3] // head_dim
    for side in range(mass.shape[0]):
        for i in range(count):
            mass[side, i] = 0
            for d in range(head_dim):
                value[side, i, d] = 0
    start, stop = max(span[0], first[0]), min(span[1], positions[count - 1] + 1)
    within = max(stop - start, 0)
    for n in range(within + keys.shape[0]):
        key = start + n if n < within else np.int64(keys[n - within])
        if key > positions[count - 1]:
            break
        page, j = table[key // block], key % block
        load_key(queries, pages[page, kv, 0], j, block, k)
        if not _probabilities(queries, seen, count, key, numbers, above, found):
            continue
        for d in range(head_dim):
            v[d] = widen(pages[page, kv, 1, j * head_dim + d])
        for i in range(count):
            mass[0, i] += probability[i]
            for d in range(head_dim):
                value[0, i, d] += probability[i] * v[d]
        weight = weights[n - within] if n >= within and weights.shape[0] else np.float32(0)
        if weight == 0:
            continue
        for i in range(count):
            p = weight * probability[i]
            mass[1, i] += p
            for d in range(head_dim):
                value[1, i, d] += p * v[d]


@njit(inline="always")
def _alike(sets, chosen, begin):
    """One past the last of the heads from `begin` on that have the same pools."""
    end = begin + 1
    while end < chosen.shape[0] and sets[chosen[end]] == sets[chosen[begin]]:
        end += 1
    return end


@njit(inline="always")
def _edges(begin, end, position, prompt, edges):
    """Where a tile's prompt rows and its generated rows begin, and where they end."""
    edges[0], edges[2] = begin, end
    edges[1] = begin + min(max(prompt - position[begin], 0), end - begin)


@njit(fastmath=FASTMATH, error_model="numpy", cache=True)
def serial(task, tasks, query, stride, pages, block_table, rows, pools, heads, model, lse, m, u):
    """Every `tasks`-th pair of a tile and a KV head from `task` on; see `parallel`."""
    request, slot, position, tiles = rows[1:]
    keys, offsets, weights, spans, above, sets, prompts = pools
    kv_heads, head_dim, per_side = pages.shape[1], u.shape[3], offsets.shape[1] - 1
    group = lse.shape[1] // kv_heads
    queries, seen = buffer_for(query, TILE * group, head_dim), seen_by(TILE * group, 0)
    sides = m.shape[2] // per_side
    found = _found_in(TILE * group, head_dim, sides)
    every, edges = np.empty(group, np.int64), np.empty(3, np.int64)
    for index in range(task, (tiles.shape[0] - 1) * kv_heads, tasks):
        kv, at, end = index % kv_heads, tiles[index // kv_heads], tiles[index // kv_heads + 1]
        m[at:end, kv * group : (kv + 1) * group] = 0
        u[at:end, kv * group : (kv + 1) * group] = 0
        s, table = slot[at], block_table[request[at]]
        chosen = every[: chosen_heads(heads, s, kv, group, every)]
        _edges(at, end, position, prompts[s], edges)
        for half in range(2):
            begin, head, alike = edges[half], 0, sets[s, half]
            while begin < edges[half + 1] and head < chosen.shape[0]:
                part = chosen[head : _alike(alike, chosen, head)]
                n, head = alike[part[0]], head + part.shape[0]
                count = load(
                    query, stride, rows, begin, edges[half + 1], part, model, queries, seen
                )
                for i in range(count):
                    found[0][i] = lse[begin + i // part.shape[0], part[i % part.shape[0]]]
                for g in range(per_side):
                    a, b = offsets[n, g], offsets[n, g + 1]
                    pool = keys[a:b], weights[a:b], spans[n, g], above[n, g]
                    _measure(queries, seen, count, pages, table, kv, pool, model[0], found)
                    for side in range(sides):
                        for i in range(count):
                            r, h = begin + i // part.shape[0], part[i % part.shape[0]]
                            m[r, h, side * per_side + g] = found[2][side, i]
                            u[r, h, side * per_side + g] = found[3][side, i]


@njit(parallel=True, cache=True)
def parallel(
    threads, query, stride, pages, block_table, rows, pools, heads, model, lse, mass, value
):
    """Fill every element of `mass` and `value`, with so many threads.

    `query` is flat, tokens `stride` apart; `rows` is `(token, request, slot, position, tiles)`;
    `pools` is `(keys, offsets, weights, spans, above, sets, prompts)`; `model` is `((scale, soft
    cap, window), slopes, sinks)`.
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
            lse,
            mass,
            value,
        )
