"""Folding the pages that a tile of queries sees into its running softmax, compiled.

Untyped, because numba compiles each function per argument types; shapes are those of
`server.kernels.partials`. Head sizes and blocks are multiples of 32. Logits are in base 2.
"""

import numpy as np
from numba import njit, types
from numba.extending import overload

from server.kernels.cpu_elements import INNER, pair, power, widen
from server.kernels.cpu_llvm import LANES
from server.kernels.cpu_vector import BLOCK, NARROW, QUERIES, fold, settle

# From this many queries on, a page is unpacked once for all of them.
UNPACK = 12


def unpack(queries, page, pairs, wide):
    """A page in the form that queries are multiplied with fastest."""
    raise NotImplementedError


@overload(unpack, inline="always")
def _unpack_for(queries, page, pairs, wide):
    """A page in the form `fold` reads fastest, in one of the buffers; or as it is, if float32."""
    if queries.dtype == types.uint32:

        def form(queries, page, pairs, wide):
            for d in range(pairs.shape[0]):
                for j in range(pairs.shape[1]):
                    pairs[d, j] = pair(page[2 * d, j], page[2 * d + 1, j])
            return pairs

    elif page.dtype == types.float32:

        def form(queries, page, pairs, wide):
            return page

    else:

        def form(queries, page, pairs, wide):
            for d in range(wide.shape[0]):
                for j in range(wide.shape[1]):
                    wide[d, j] = widen(page[d, j])
            return wide

    return form


@njit(inline="always")
def _fold_page(queries, page, seen, begin, count, start, shape, numbers, weigh):
    """Fold the keys of a page into the queries `begin..count`.

    `page` is `(keys, values, the keys that are folded next, marks, whether there are any)`.
    """
    keys, values, following, marks, marked = page
    peak, total, positions, first, slopes, sums, bias, kind = seen
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
                    kind,
                    marks,
                ),
                (i, j, visible - j, start, head_dim, block, scale, cap),
            )
            j += step


@njit(inline="always")
def unpacked_page(head_dim, block, kinds):
    """Buffers for a page's keys and for its values: in pairs, and in float32; and for marks."""
    return (
        (np.empty((head_dim // 2, block), np.uint32), np.empty((head_dim, block), np.float32)),
        (np.empty((block // 2, head_dim), np.uint32), np.empty((block, head_dim), np.float32)),
        np.zeros((kinds, block), np.float32),
    )


@njit(**INNER)
def many(block):
    """Keys that pools have of a page, from which on all of it is left to `cpu_keys`."""
    return max(block // 8, 4)


@njit(**INNER)
def pooled_keys(keys, bounds, spans, start, stop):
    """How many of the keys `start..stop` pools have, of the kind of query of which they have most.

    Pool `g` of kind `n` is `keys[bounds[n, g] : bounds[n, g + 1]]`, ascending, and
    `spans[n, g, 0] <= key < spans[n, g, 1]`.
    """
    most = 0
    for kind in range(bounds.shape[0]):
        some = 0
        for g in range(spans.shape[1]):
            a, b = bounds[kind, g], bounds[kind, g + 1]
            if a < b and keys[a] < stop and keys[b - 1] >= start:
                listed = keys[a:b]
                some += np.searchsorted(listed, stop) - np.searchsorted(listed, start)
            some += max(min(spans[kind, g, 1], stop) - max(spans[kind, g, 0], start), 0)
        most = max(most, some)
    return most


@njit(**INNER)
def _mark(pools, start, marks):
    """Mark what is pooled of the page at `start`, kind by kind."""
    keys, bounds, spans = pools
    stop = start + marks.shape[1]
    for kind in range(bounds.shape[0]):
        for g in range(spans.shape[1]):
            listed = keys[bounds[kind, g] : bounds[kind, g + 1]]
            low, high = np.searchsorted(listed, start), np.searchsorted(listed, stop)
            for key in listed[low:high]:
                marks[kind, key - start] = 1
            begin, end = max(spans[kind, g, 0], start), min(spans[kind, g, 1], stop)
            for key in range(begin, end):
                marks[kind, key - start] = 1


@njit(**INNER)
def fold_pages(queries, count, pages, table, kv, pools, numbers, seen, buffers, weigh):
    """Fold every page that some query of the tile sees; its values only if `weigh`.

    `pools` is `(keys, bounds, spans)` as of `pooled_keys`, and `limit`: the logits of what it has
    for a query's kind get the query's bias. Pages of which it has so many keys are passed over.
    """
    keys, bounds, spans, limit = pools
    head_dim = buffers[0][1].shape[0]
    block, (positions, first) = pages.shape[3] // head_dim, seen[2:4]
    final, begin, shape, marks = positions[count - 1], 0, (head_dim, block), buffers[2]
    for index in range(first[0] // block, final // block + 1):
        start = index * block
        while positions[begin] < start:
            begin += 1
        some = pooled_keys(keys, bounds, spans, start, start + block)
        if some >= limit:
            continue
        marks[:] = 0
        if some:
            _mark((keys, bounds, spans), start, marks)
        columns = pages[table[index], kv, 0].reshape(head_dim, block)
        values = pages[table[index], kv, 1].reshape(block, head_dim)
        if count - begin < UNPACK:
            following = pages[table[min(index + 1, final // block)], kv, 0]
            given = columns, values, following.reshape(head_dim, block), marks, some > 0
            _fold_page(queries, given, seen, begin, count, start, shape, numbers, weigh)
        else:
            near = unpack(queries, columns, buffers[0][0], buffers[0][1])
            beside = unpack(queries, values, buffers[1][0], buffers[1][1]) if weigh else near
            page = near, beside, near, marks, some > 0
            _fold_page(queries, page, seen, begin, count, start, shape, numbers, weigh)


@njit(inline="always")
def _add_sink(lse, sink):
    high = max(lse, sink)
    return high + np.log2(power(lse - high) + power(sink - high))


@njit(inline="always")
def log_sum_exp(seen, i, sinks, h):
    """Of query `i`, head `h`, after the last page."""
    peak, total = settle(seen[0], seen[1], i)
    lse = peak + np.log2(total)
    return _add_sink(lse, sinks[h]) if sinks.shape[0] else lse
