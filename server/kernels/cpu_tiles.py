"""Tiles: neighbouring rows of a request and the selected query heads of one KV head, compiled.

Untyped, because numba compiles each function per argument types. A tile's queries are float32, or
bfloat16 in pairs of 32 bits where the host multiplies them so; that is how they come in.
"""

import numpy as np
from numba import njit, types
from numba.extending import overload

from server.kernels.cpu_elements import widen
from server.kernels.cpu_llvm import LANES
from server.kernels.cpu_vector import LOWEST

_LOWEST = np.float32(LOWEST)


def buffer_for(query, limit, head_dim):
    """An empty tile of queries."""
    raise NotImplementedError


@overload(buffer_for, inline="always")
def _buffer_for(query, limit, head_dim):
    if query.dtype == types.uint32:
        return lambda query, limit, head_dim: np.empty((limit, head_dim // 2), np.uint32)
    return lambda query, limit, head_dim: np.empty((limit, head_dim), np.float32)


def element(x):
    """An element of a query as the tile holds it."""
    raise NotImplementedError


@overload(element, inline="always")
def _element_for(x):
    if x == types.uint32:
        return lambda x: x
    return lambda x: widen(x)


def dot(queries, i, k):
    """Query `i` times a float32 key."""
    raise NotImplementedError


@overload(dot, inline="always")
def _dot_for(queries, i, k):
    if queries.dtype == types.uint32:

        def product(queries, i, k):
            total, half = np.float32(0), queries.shape[1]
            for d in range(half):
                low = np.uint32(queries[i, d] << np.uint32(16)).view(np.float32)
                high = np.uint32(queries[i, d] & np.uint32(0xFFFF0000)).view(np.float32)
                total += low * k[d] + high * k[half + d]
            return total

    else:

        def product(queries, i, k):
            total = np.float32(0)
            for d in range(queries.shape[1]):
                total += queries[i, d] * k[d]
            return total

    return product


def load_key(queries, page, j, block, k):
    """Key `j` of a page in the order `dot` takes its channels."""
    raise NotImplementedError


@overload(load_key, inline="always")
def _load_key_for(queries, page, j, block, k):
    if queries.dtype == types.uint32:

        def load(queries, page, j, block, k):
            half = queries.shape[1]
            for d in range(half):
                k[d] = widen(page[2 * d * block + j])
                k[half + d] = widen(page[(2 * d + 1) * block + j])

    else:

        def load(queries, page, j, block, k):
            for d in range(k.shape[0]):
                k[d] = widen(page[d * block + j])

    return load


@njit(inline="always")
def chosen_heads(heads, slot, kv, group, chosen):
    """Fill `chosen` with the slot's selected query heads of a KV head; how many there are."""
    count = 0
    for h in range(kv * group, (kv + 1) * group):
        if heads[slot, h]:
            chosen[count] = h
            count += 1
    return count


@njit(inline="always")
def seen_by(limit, channels):
    """Buffers for what a tile's queries see.

    `(peak, total, position, first key, ALiBi slope, value sums, bias, kind)`; sums of so many
    channels.
    """
    return (
        np.empty((limit, LANES), np.float32),
        np.empty((limit, LANES), np.float32),
        np.empty(limit, np.int64),
        np.empty(limit, np.int64),
        np.empty(limit, np.float32),
        np.empty((limit, channels), np.float32),
        np.empty(limit, np.float32),
        np.empty(limit, np.int64),
    )


@njit(inline="always")
def load(query, stride, rows, begin, end, chosen, model, queries, seen):
    """Take up the queries of a tile, row by row; how many there are."""
    (_, _, window), alibi, _ = model
    peak, total, positions, first, slopes, sums, bias, kind = seen
    width, i = queries.shape[1], np.int64(0)  # a bare 0 has callers compiled for 0 as well
    for r in range(begin, end):
        last = rows[3][r]
        for h in chosen:
            at = rows[0][r] * stride + h * width
            for d in range(width):
                queries[i, d] = element(query[at + d])
            positions[i] = last
            first[i] = max(last - window + 1, 0) if window > 0 else 0
            slopes[i] = alibi[h] if alibi.shape[0] else np.float32(0)
            for lane in range(LANES):
                peak[i, lane] = _LOWEST
                total[i, lane] = 0
            for d in range(sums.shape[1]):
                sums[i, d] = 0
            bias[i] = kind[i] = 0
            i += 1
    return i
