"""Column means of attention over the paged cache, compiled.

Untyped, because numba compiles each function per argument types; shapes are those of
`server.kernels.partials`. Log-sum-exps and logits are in base 2.
"""

import numpy as np
from numba import njit, prange, types
from numba.extending import overload

from server.kernels.cpu_elements import FASTMATH, power, widen
from server.kernels.cpu_tiles import buffer_for, chosen_heads, load, seen_by
from server.kernels.partials import TILE


def _channels(queries, i, x):
    raise NotImplementedError


@overload(_channels, inline="always")
def _channels_for(queries, i, x):
    """Query `i` in float32, channel by channel."""
    if queries.dtype == types.uint32:

        def channels(queries, i, x):
            for d in range(queries.shape[1]):
                x[2 * d] = np.uint32(queries[i, d] << np.uint32(16)).view(np.float32)
                x[2 * d + 1] = np.uint32(queries[i, d] & np.uint32(0xFFFF0000)).view(np.float32)

    else:

        def channels(queries, i, x):
            for d in range(x.shape[0]):
                x[d] = queries[i, d]

    return channels


@njit(inline="always")
def _products(x, page, score):
    """`score[j] = x . page[:, j]`, four channels at a time: fewer trips to memory."""
    for j in range(page.shape[1]):
        score[j] = 0
    for d in range(0, page.shape[0], 4):
        a, b, c, e = x[d], x[d + 1], x[d + 2], x[d + 3]
        for j in range(page.shape[1]):
            score[j] += (
                a * page[d, j] + b * page[d + 1, j] + c * page[d + 2, j] + e * page[d + 3, j]
            )


@njit(inline="always")
def _add_row(score, seen, i, start, numbers, lse, column):
    """Add the probabilities of query `i` on the page that starts at `start` to its columns."""
    scale, cap, _ = numbers
    position, first, slope = seen[2][i], seen[3][i], seen[4][i]
    begin, end = max(first - start, 0), min(position - start + 1, score.shape[0])
    # Slices, because loops that begin elsewhere than at 0 are not vectorised.
    part, total = score[begin : max(end, begin)], column[begin : max(end, begin)]
    for j in range(part.shape[0]):
        part[j] = part[j] * scale
    if cap > 0 or slope != 0:
        for j in range(part.shape[0]):
            distance = np.float32(start + begin + j - position)
            capped = cap * np.tanh(part[j] / cap) if cap > 0 else part[j]
            part[j] = capped + slope * distance
    for j in range(part.shape[0]):
        x = part[j] - lse
        part[j] = power(np.float32(0) if x > 0 else x)
    for j in range(part.shape[0]):
        total[j] += part[j]


@njit(inline="always")
def _last_tile(slot, tiles, t):
    """One past the last tile of the slot that tile `t` belongs to."""
    last = t + 1
    while last < tiles.shape[0] - 1 and slot[tiles[last]] == slot[tiles[t]]:
        last += 1
    return last


@njit(fastmath=FASTMATH, error_model="numpy", cache=True)
def serial(task, tasks, query, stride, pages, head_dim, block_table, rows, heads, model, lse, out):
    """Every `tasks`-th pair of a page of keys and a KV head from `task` on; see `parallel`."""
    request, slot, position, tiles = rows[1:]
    kv_heads, block = pages.shape[1], pages.shape[3] // head_dim
    group = out.shape[0] // kv_heads
    queries, seen = buffer_for(query, TILE * group, head_dim), seen_by(TILE * group, 0)
    page, column = np.empty((head_dim, block), np.float32), np.empty((group, block), np.float64)
    x, score = np.empty(head_dim, np.float32), np.empty(block, np.float32)
    every, index = np.empty(group, np.int64), -1
    for t in range(tiles.shape[0] - 1):
        at = tiles[t]
        if position[at] % block != 0:
            continue
        for kv in range(kv_heads):
            index += 1
            chosen = every[: chosen_heads(heads, slot[at], kv, group, every)]
            if index % tasks != task or chosen.shape[0] == 0:
                continue
            bits = pages[block_table[request[at], position[at] // block], kv, 0]
            packed = bits.reshape(head_dim, block)
            for d in range(head_dim):
                for j in range(block):
                    page[d, j] = widen(packed[d, j])
            column[:] = 0
            last = _last_tile(slot, tiles, t)
            for tile in range(t, last):
                begin, end = tiles[tile], tiles[tile + 1]
                count = load(query, stride, rows, begin, end, chosen, model, queries, seen)
                if seen[3][0] >= position[at] + block:
                    break
                for i in range(count):
                    r, c = begin + i // chosen.shape[0], i % chosen.shape[0]
                    _channels(queries, i, x)
                    _products(x, page, score)
                    _add_row(score, seen, i, position[at], model[0], lse[r, chosen[c]], column[c])
            rest = tiles[last] - at
            for c in range(chosen.shape[0]):
                for j in range(min(block, rest)):
                    out[chosen[c], at + j] = column[c, j] / (rest - j)


@njit(parallel=True, cache=True)
def parallel(threads, query, stride, pages, head_dim, block_table, rows, heads, model, lse, out):
    """Fill `out` float32 `[query_heads, rows]` where `heads` is set, with so many threads.

    The rows of a slot are all of its prompt, and a page begins with a tile: `TILE` divides the
    block. A thread has a page's columns to itself and sums them over the rows below. `query` is
    flat, tokens `stride` apart, and bfloat16 perhaps in pairs; `rows` is `(token, request, slot,
    position, tiles)`; `model` is `((scale, soft cap, window), slopes, sinks)`.
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
            out,
        )
