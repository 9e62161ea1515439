"""Column means of attention over the paged cache, compiled.

Untyped, because numba compiles each function per argument types; shapes are those of
`server.kernels.partials`. Log-sum-exps and logits are in base 2.
"""

import numpy as np
from numba import njit, prange

from server.kernels.cpu_elements import FASTMATH, INNER, power
from server.kernels.cpu_fold import unpack, unpacked_page
from server.kernels.cpu_stretch import score_many
from server.kernels.cpu_tiles import buffer_for, chosen_heads, load, seen_by
from server.kernels.cpu_vector import QUERIES
from server.kernels.partials import TILE


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
def _add_tile(queries, count, seen, part, page, numbers, scores, lse, column):
    """Add the probabilities of a tile's queries; `part` is `(begin, heads, start of the page)`."""
    begin, heads, start = part
    for first in range(0, count, QUERIES):
        number = min(QUERIES, count - first)
        score_many(queries, first, number, page, page, scores.shape[1], scores)
        for q in range(number):
            i = first + q
            r, c = begin + i // heads.shape[0], i % heads.shape[0]
            _add_row(scores[q], seen, i, start, numbers, lse[r, heads[c]], column[c])


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
    group, block = out.shape[0] // pages.shape[1], pages.shape[3] // head_dim
    queries, seen = buffer_for(query, TILE * group, head_dim), seen_by(TILE * group, 0)
    page, scores = unpacked_page(head_dim, block, 1)[0], np.empty((QUERIES, block), np.float32)
    given = page, scores, np.empty((group, block), np.float64), np.empty(group, np.int64)
    of = query, stride, rows, heads, model
    _sum_pages(task, tasks, of, pages, block_table, queries, seen, given, lse, out)


@njit(**INNER)
def _sum_pages(task, tasks, of, pages, block_table, queries, seen, given, lse, out):
    query, stride, rows, heads, model = of
    request, slot, position, tiles = rows[1:]
    buffers, scores, column, every = given
    kv_heads, (group, block), index = pages.shape[1], column.shape, -1
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
            page = unpack(queries, bits.reshape(-1, block), buffers[0], buffers[1])
            column[:] = 0
            last = _last_tile(slot, tiles, t)
            for tile in range(t, last):
                begin, end = tiles[tile], tiles[tile + 1]
                count = load(query, stride, rows, begin, end, chosen, model, queries, seen)
                if seen[3][0] >= position[at] + block:
                    break
                part = begin, chosen, position[at]
                _add_tile(queries, count, seen, part, page, model[0], scores, lse, column)
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
