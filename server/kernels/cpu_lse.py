"""Log-sum-exps of attention rows over the paged cache, compiled.

Untyped, because numba compiles each function per argument types; shapes are those of
`server.kernels.partials`. Head sizes and blocks are multiples of 32. Logits are in base 2: scale,
soft cap and slopes come multiplied by log2(e), and so does the result.
"""

import numpy as np
from numba import njit, prange, types
from numba.extending import overload

from server.kernels.cpu_elements import FASTMATH, pair, power, widen
from server.kernels.cpu_llvm import LANES
from server.kernels.cpu_tiles import buffer_for, chosen_heads, load, seen_by
from server.kernels.cpu_vector import BLOCK, NARROW, QUERIES, fold, settle
from server.kernels.partials import TILE

# From this many queries on, a page is unpacked once for all of them.
UNPACK = 12


def _unpack(queries, page, pairs, wide):
    raise NotImplementedError


@overload(_unpack, inline="always")
def _unpack_for(queries, page, pairs, wide):
    """A page in the form `fold` reads fastest, in one of the buffers; or as it is, if float32."""
    if queries.dtype == types.uint32:

        def unpack(queries, page, pairs, wide):
            for d in range(pairs.shape[0]):
                for j in range(pairs.shape[1]):
                    pairs[d, j] = pair(page[2 * d, j], page[2 * d + 1, j])
            return pairs

    elif page.dtype == types.float32:

        def unpack(queries, page, pairs, wide):
            return page

    else:

        def unpack(queries, page, pairs, wide):
            for d in range(wide.shape[0]):
                for j in range(wide.shape[1]):
                    wide[d, j] = widen(page[d, j])
            return wide

    return unpack


@njit(inline="always")
def _fold_page(queries, page, seen, begin, count, start, shape, numbers, weigh):
    """Fold the keys of a page into the queries `begin..count`.

    `page` is `(keys, values, the keys that are folded next, marks, whether there are any)`.
    """
    keys, values, following, marks, marked = page
    peak, total, positions, first, slopes, sums, bias = seen
    scale, cap, _ = numbers
    head_dim, block = shape
    for i in range(begin, count, QUERIES):
        n = min(QUERIES, count - i)
        shaped = marked or cap > 0 or slopes[i] != 0
        j, visible = 0, min(positions[i + n - 1] - start + 1, block)
        while j < visible:
            wide = block % BLOCK == 0 and visible - j > NARROW * LANES
            step = LANES * ((8 if n <= 3 else 4) if wide else NARROW)
            inside = positions[i] >= start + j + step - 1 and first[i + n - 1] <= start + j
            fold(
                inside and not shaped,
                wide,
                weigh,
                n,
                (
                    queries,
                    keys,
                    values,
                    following,
                    peak,
                    total,
                    sums,
                    positions,
                    first,
                    slopes,
                    bias,
                    marks,
                ),
                (i, j, visible - j, start, head_dim, block, scale, cap),
            )
            j += step


@njit(inline="always")
def _add_sink(lse, sink):
    high = max(lse, sink)
    return high + np.log2(power(lse - high) + power(sink - high))


@njit(inline="always")
def unpacked_page(head_dim, block):
    """Buffers for a page's keys and for its values: in pairs, and in float32; and for marks."""
    return (
        (np.empty((head_dim // 2, block), np.uint32), np.empty((head_dim, block), np.float32)),
        (np.empty((block // 2, head_dim), np.uint32), np.empty((block, head_dim), np.float32)),
        np.zeros(block, np.float32),
    )


@njit
def _mark(keys, start, marks):
    """Mark those of the ascending keys that are in the page at `start`; whether there are any."""
    low, high = np.searchsorted(keys, start), np.searchsorted(keys, start + marks.shape[0])
    marks[:] = 0
    for key in keys[low:high]:
        marks[key - start] = 1
    return low < high


@njit(inline="always")
def fold_pages(queries, count, pages, table, kv, biased, numbers, seen, buffers, weigh):
    """Fold every page that some query of the tile sees; its values only if `weigh`.

    The logits of the keys `biased`, which are ascending, get the queries' bias.
    """
    head_dim = buffers[0][1].shape[0]
    block, (positions, first) = pages.shape[3] // head_dim, seen[2:4]
    final, begin, shape, marks = positions[count - 1], 0, (head_dim, block), buffers[2]
    for index in range(first[0] // block, final // block + 1):
        start = index * block
        while positions[begin] < start:
            begin += 1
        marked = _mark(biased, start, marks)
        keys = pages[table[index], kv, 0].reshape(head_dim, block)
        values = pages[table[index], kv, 1].reshape(block, head_dim)
        if count - begin < UNPACK:
            following = pages[table[min(index + 1, final // block)], kv, 0]
            given = keys, values, following.reshape(head_dim, block), marks, marked
            _fold_page(queries, given, seen, begin, count, start, shape, numbers, weigh)
        else:
            near = _unpack(queries, keys, buffers[0][0], buffers[0][1])
            beside = _unpack(queries, values, buffers[1][0], buffers[1][1]) if weigh else near
            page = near, beside, near, marks, marked
            _fold_page(queries, page, seen, begin, count, start, shape, numbers, weigh)


@njit(inline="always")
def log_sum_exp(seen, i, sinks, h):
    """Of query `i`, head `h`, after the last page."""
    peak, total = settle(seen[0], seen[1], i)
    lse = peak + np.log2(total)
    return _add_sink(lse, sinks[h]) if sinks.shape[0] else lse


@njit(fastmath=FASTMATH, error_model="numpy", cache=True)
def serial(task, tasks, query, stride, pages, head_dim, block_table, rows, heads, model, out):
    """Every `tasks`-th pair of a tile and a KV head from `task` on; see `parallel`."""
    request, slot, tiles = rows[1], rows[2], rows[4]
    kv_heads = pages.shape[1]
    group = out.shape[1] // kv_heads
    queries, seen = buffer_for(query, TILE * group, head_dim), seen_by(TILE * group, 0)
    buffers = unpacked_page(head_dim, pages.shape[3] // head_dim)
    every, nothing = np.empty(group, np.int64), np.empty(0, np.int32)
    for index in range(task, (tiles.shape[0] - 1) * kv_heads, tasks):
        kv, begin, end = index % kv_heads, tiles[index // kv_heads], tiles[index // kv_heads + 1]
        chosen = every[: chosen_heads(heads, slot[begin], kv, group, every)]
        if chosen.shape[0] == 0:
            continue
        count = load(query, stride, rows, begin, end, chosen, model, queries, seen)
        table = block_table[request[begin]]
        fold_pages(queries, count, pages, table, kv, nothing, model[0], seen, buffers, False)
        i = 0
        for r in range(begin, end):
            for h in chosen:
                out[r, h] = log_sum_exp(seen, i, model[2], h)
                i += 1


@njit(parallel=True, cache=True)
def parallel(threads, query, stride, pages, head_dim, block_table, rows, heads, model, out):
    """Fill `out` float32 `[rows, query_heads]` where `heads` is set, with so many threads.

    `query` is flat, tokens `stride` apart, and bfloat16 perhaps in pairs; `rows` is
    `(token, request, slot, position, tiles)`; `model` is `((scale, soft cap, window), slopes,
    sinks)`.
    """
    numbers, alibi, sinks = model
    for thread in prange(threads):
        given = (numbers, alibi, sinks)
        serial(
            thread, threads, query, stride, pages, head_dim, block_table, rows, heads, given, out
        )
