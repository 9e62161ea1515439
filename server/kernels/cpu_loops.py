"""The compiled half of the CPU kernels: loops that numba turns into vector code.

Untyped, because numba compiles each function per argument types; shapes are those of
`server.kernels.partials`. Head dimensions are multiples of 4.
"""

import numpy as np
from numba import njit, prange, types
from numba.extending import overload

# Everything but the licence to ignore NaN and infinity.
FASTMATH = {"contract", "reassoc", "nsz", "arcp"}

LOG2E = np.float32(1.4426950408889634)
FLOAT16_REBIAS = np.float32(2.0**112)
LOWEST = np.float32(-3.0e38)


def _widen(x):
    raise NotImplementedError


@overload(_widen, inline="always")
def _widen_for(x):
    if isinstance(x, types.Float):
        return lambda x: x
    if x == types.uint16:
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)

    def widen_float16(x):
        bits = np.uint32(np.uint16(x))
        magnitude = np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13)).view(np.float32)
        sign = np.float32(1) - np.float32(2) * np.float32(bits >> np.uint32(15))
        return magnitude * FLOAT16_REBIAS * sign

    return widen_float16


@njit(inline="always", fastmath=FASTMATH)
def _exp(x):
    """`e^x` for x <= 0 to 2 ulp, in operations that vectorise (`np.exp` does not)."""
    y = max(x * LOG2E, np.float32(-126))
    whole = np.floor(y + np.float32(0.5))
    f = y - whole
    p = np.float32(1.535336188319500e-4)
    p = p * f + np.float32(1.339887440266574e-3)
    p = p * f + np.float32(9.618437357674640e-3)
    p = p * f + np.float32(5.550332471162809e-2)
    p = p * f + np.float32(2.402264791363012e-1)
    p = p * f + np.float32(6.931472028550421e-1)
    p = p * f + np.float32(1)
    return p * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(inline="always", fastmath=FASTMATH)
def _shape(score, soft_cap, slope, distance):
    if soft_cap > 0:
        score = soft_cap * np.tanh(score / soft_cap)
    return score + slope * distance


@njit(fastmath=FASTMATH, error_model="numpy", cache=True)
def _scores(q, page, out):
    """`out[j] = sum_d q[d] page[d, j]`; head dimensions are multiples of 4."""
    for j in range(out.shape[0]):
        out[j] = np.float32(0)
    for d in range(0, q.shape[0], 4):
        q0, q1, q2, q3 = q[d], q[d + 1], q[d + 2], q[d + 3]
        k0, k1, k2, k3 = page[d], page[d + 1], page[d + 2], page[d + 3]
        for j in range(out.shape[0]):
            out[j] += (q0 * _widen(k0[j]) + q1 * _widen(k1[j])) + (
                q2 * _widen(k2[j]) + q3 * _widen(k3[j])
            )


@njit(fastmath=FASTMATH, error_model="numpy", cache=True)
def _accumulate(scores, first, last, start, soft_cap, slope, top, total):
    """Fold the visible keys `first..last` of a page that starts at `start` into (max, sum)."""
    low, high = max(first - start, 0), min(last - start + 1, scores.shape[0])
    if low >= high:
        return top, total
    if soft_cap > 0 or slope != 0:
        for j in range(low, high):
            scores[j] = _shape(scores[j], soft_cap, slope, np.float32(start + j - last))
    peak = top
    for j in range(low, high):
        peak = max(peak, scores[j])
    fresh = np.float32(0)
    for j in range(low, high):
        fresh += _exp(scores[j] - peak)
    return peak, total * _exp(top - peak) + fresh


@njit(fastmath=FASTMATH, error_model="numpy", cache=True)
def _log_sum_exp(q, pages, table, kv, first, positions, soft_cap, slopes, selected, out):
    """`out[row, head]` for the rows of a tile and the heads that share KV head `kv`."""
    count, group, head_dim = q.shape
    block = pages.shape[3] // head_dim
    scores = np.empty(block, np.float32)
    wide = np.empty((head_dim, block), np.float32)
    total = np.zeros((count, group), np.float32)
    out[:] = LOWEST
    for index in range(first[0] // block, positions[count - 1] // block + 1):
        start = index * block
        page = pages[table[index], kv, 0].reshape(head_dim, block)
        if count > 1:
            for d in range(head_dim):
                for j in range(block):
                    wide[d, j] = _widen(page[d, j])
        for r in range(count):
            for h in range(group):
                if positions[r] < start or not selected[h]:
                    continue
                if count > 1:
                    _scores(q[r, h], wide, scores)
                else:
                    _scores(q[r, h], page, scores)
                out[r, h], total[r, h] = _accumulate(
                    scores,
                    first[r],
                    positions[r],
                    start,
                    soft_cap,
                    slopes[h],
                    out[r, h],
                    total[r, h],
                )
    out += np.log(np.maximum(total, np.float32(1e-37)))


@njit(fastmath=FASTMATH, error_model="numpy", cache=True)
def _pool(q, pages, table, kv, keys, first, last, soft_cap, slope, lse, value):
    """Mass of the visible `keys`; their weighted values are added into `value`."""
    head_dim, mass = q.shape[0], np.float32(0)
    block = pages.shape[3] // head_dim
    for key in keys:
        if key < first or key > last:
            continue
        page, j = pages[table[key // block], kv], key % block
        score = np.float32(0)
        for d in range(head_dim):
            score += q[d] * _widen(page[0, d * block + j])
        p = _exp(min(_shape(score, soft_cap, slope, np.float32(key - last)) - lse, np.float32(0)))
        mass += p
        for d in range(head_dim):
            value[d] += p * _widen(page[1, j * head_dim + d])
    return mass


@njit(parallel=True, fastmath=FASTMATH, error_model="numpy", cache=True)
def partials(
    query,
    pages,
    block_table,
    request,
    slot,
    position,
    tiles,
    keys,
    offsets,
    heads,
    soft_cap,
    window,
    alibi_slopes,
    sinks,
    mass,
    value,
):
    """Fill `mass` and `value`; `query` is scaled, float32 and holds the mapped rows only."""
    kv_heads = pages.shape[1]
    group = query.shape[1] // kv_heads
    for task in prange((tiles.shape[0] - 1) * kv_heads):
        tile, kv = task // kv_heads, task % kv_heads
        begin, end = tiles[tile], tiles[tile + 1]
        s, head = slot[begin], kv * group
        selected = heads[s, head : head + group]
        if not selected.any():
            continue
        q, rows = query[begin:end, head : head + group], position[begin:end]
        table = block_table[request[begin]]
        slopes = np.zeros(group, np.float32)
        if alibi_slopes.shape[0]:
            slopes[:] = alibi_slopes[head : head + group]
        first = np.zeros(end - begin, np.int32)
        if window > 0:
            first[:] = np.maximum(rows - np.int32(window - 1), 0)
        lse = np.empty((end - begin, group), np.float32)
        _log_sum_exp(q, pages, table, kv, first, rows, soft_cap, slopes, selected, lse)
        for r in range(end - begin):
            for h in range(group):
                if not selected[h]:
                    continue
                total = lse[r, h]
                if sinks.shape[0]:
                    high = max(total, sinks[head + h])
                    total = high + np.log(_exp(total - high) + _exp(sinks[head + h] - high))
                for g in range(offsets.shape[1] - 1):
                    mass[begin + r, head + h, g] = _pool(
                        q[r, h],
                        pages,
                        table,
                        kv,
                        keys[offsets[s, g] : offsets[s, g + 1]],
                        first[r],
                        rows[r],
                        soft_cap,
                        slopes[h],
                        total,
                        value[begin + r, head + h, g],
                    )
