"""Probabilities of some keys over the paged cache, compiled.

Untyped, because numba compiles each function per argument types; shapes are those of
`server.kernels.partials`. Log-sum-exps and logits are in base 2.
"""

import numpy as np
from numba import njit, prange

from server.kernels.cpu_elements import FASTMATH, INNER, power
from server.kernels.cpu_pools import shape
from server.kernels.cpu_tiles import buffer_for, chosen_heads, dot, load, load_key, seen_by
from server.kernels.partials import TILE


@njit(fastmath=FASTMATH, error_model="numpy", cache=True)
def serial(
    task, tasks, query, stride, pages, head_dim, block_table, rows, heads, model, lse, keys, out
):
    """Every `tasks`-th pair of a tile and a KV head from `task` on; see `parallel`."""
    group = out.shape[0] // pages.shape[1]
    queries, seen = buffer_for(query, TILE * group, head_dim), seen_by(TILE * group, 0)
    given = np.empty(group, np.int64), np.empty(head_dim, np.float32)
    of = query, stride, rows, heads, model
    _measure_tiles(task, tasks, of, pages, block_table, queries, seen, given, lse, keys, out)


@njit(**INNER)
def _measure_tiles(task, tasks, of, pages, block_table, queries, seen, given, lse, keys, out):
    query, stride, rows, heads, model = of
    every, k = given
    request, slot, position, tiles = rows[1:]
    kv_heads, block, group = pages.shape[1], pages.shape[3] // k.shape[0], every.shape[0]
    (scale, cap, _), positions, first, slopes = model[0], seen[2], seen[3], seen[4]
    for index in range(task, (tiles.shape[0] - 1) * kv_heads, tasks):
        kv, begin, end = index % kv_heads, tiles[index // kv_heads], tiles[index // kv_heads + 1]
        chosen = every[: chosen_heads(heads, slot[begin], kv, group, every)]
        if chosen.shape[0] == 0:
            continue
        count = load(query, stride, rows, begin, end, chosen, model, queries, seen)
        table = block_table[request[begin]]
        for n in range(keys.shape[0]):
            key = keys[n]
            if key > position[end - 1]:
                continue
            load_key(queries, pages[table[key // block], kv, 0], key % block, block, k)
            for i in range(count):
                if key < first[i] or key > positions[i]:
                    continue
                r, h = begin + i // chosen.shape[0], chosen[i % chosen.shape[0]]
                distance = np.float32(key - positions[i])
                x = shape(dot(queries, i, k) * scale, cap, slopes[i], distance) - lse[r, h]
                out[h, r, n] = power(np.float32(0) if x > 0 else x)


@njit(parallel=True, cache=True)
def parallel(
    threads, query, stride, pages, head_dim, block_table, rows, heads, model, lse, keys, out
):
    """Fill `out` float32 `[query_heads, rows, keys]` where a row sees a key, with so many threads.

    The rest is left as it is. `query` is flat, tokens `stride` apart, and bfloat16 perhaps in
    pairs; `rows` is `(token, request, slot, position, tiles)`; `model` is `((scale, soft cap,
    window), slopes, sinks)`; `keys` are positions.
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
            head_dim,
            block_table,
            rows,
            heads,
            given,
            lse,
            keys,
            out,
        )
