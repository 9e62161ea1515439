"""The compiled loops of the CPU kernels.

Untyped, because numba compiles each function per argument types; shapes are those of
`server.kernels.partials`. Head sizes and blocks are multiples of 32.
"""

import numpy as np
from numba import njit, prange, types
from numba.extending import overload

from server.kernels.cpu_vector import KEYS, QUERIES, float_to_half, half_to_float, make_dot

# Everything but the licence to ignore NaN and infinity.
FASTMATH = {"contract", "reassoc", "nsz", "arcp"}

LOG2E = np.float32(1.4426950408889634)
LOWEST = np.float32(-3.0e38)

_dot1, _dot2, _dot3, _dot4, _dot5, _dot6 = (make_dot(n) for n in range(1, QUERIES + 1))


def _widen(x):
    raise NotImplementedError


@overload(_widen, inline="always")
def _widen_for(x):
    if x == types.uint16:
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    if x == types.int16:
        return lambda x: half_to_float(x)
    return lambda x: x


def _store(row, x):
    raise NotImplementedError


@overload(_store, inline="always")
def _store_for(row, x):  # noqa: ARG001 - numba's protocol
    """Round float32 `x` to the type of `row`, to nearest even."""
    if row.dtype == types.uint16:

        def store(row, x):
            for d in range(row.shape[0]):
                bits = np.float32(x[d]).view(np.uint32)
                even = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
                row[d] = np.uint32(bits + np.uint32(0x7FFF) + even) >> np.uint32(16)

    elif row.dtype == types.int16:

        def store(row, x):
            for d in range(row.shape[0]):
                row[d] = float_to_half(x[d])

    else:

        def store(row, x):
            row[:] = x

    return store


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


# A NaN lost here comes back through the sum of exponentials.
@njit(fastmath={*FASTMATH, "nnan"}, error_model="numpy", cache=True)
def _peak(scores, low, high, peak):
    for j in range(low, high):
        peak = max(peak, scores[j])
    return peak


@njit(fastmath=FASTMATH, error_model="numpy", cache=True)
def _scores(q, page, out, begin, keys):
    """`out[i, j] = q[i] . page[:, j]` for queries from `begin` on and the first `keys` keys."""
    count, head_dim, block = q.shape[0], q.shape[1], page.shape[1]
    tail = (count - begin) % QUERIES
    full = count - tail
    for j in range(0, keys, KEYS):
        for i in range(begin, full, QUERIES):
            _dot6(q, page, out, i, j, head_dim, block)
        if tail == 1:
            _dot1(q, page, out, full, j, head_dim, block)
        elif tail == 2:
            _dot2(q, page, out, full, j, head_dim, block)
        elif tail == 3:
            _dot3(q, page, out, full, j, head_dim, block)
        elif tail == 4:
            _dot4(q, page, out, full, j, head_dim, block)
        elif tail == 5:
            _dot5(q, page, out, full, j, head_dim, block)


@njit(fastmath=FASTMATH, error_model="numpy", cache=True)
def _accumulate(scores, first, last, start, soft_cap, slope, top, total):
    """Fold the visible keys `first..last` of a page that starts at `start` into (max, sum)."""
    low, high = max(first - start, 0), min(last - start + 1, scores.shape[0])
    if low >= high:
        return top, total
    if soft_cap > 0 or slope != 0:
        for j in range(low, high):
            scores[j] = _shape(scores[j], soft_cap, slope, np.float32(start + j - last))
    peak = _peak(scores, low, high, top)
    fresh = np.float32(0)
    for j in range(low, high):
        fresh += _exp(scores[j] - peak)
    return peak, total * _exp(top - peak) + fresh


@njit(fastmath=FASTMATH, error_model="numpy", cache=True)
def _log_sum_exp(q, positions, first, slopes, pages, table, kv, soft_cap, out):
    """`out[i]` of each query; queries are in ascending order of position."""
    count, head_dim = q.shape
    block = pages.shape[3] // head_dim
    scores = np.empty((count, block), np.float32)
    total = np.zeros(count, np.float32)
    out[:] = LOWEST
    final, begin = positions[count - 1], 0
    for index in range(first[0] // block, final // block + 1):
        start = index * block
        while positions[begin] < start:
            begin += 1
        page = pages[table[index], kv, 0].reshape(head_dim, block)
        _scores(q, page, scores, begin, min(final - start + 1, block))
        for i in range(begin, count):
            out[i], total[i] = _accumulate(
                scores[i], first[i], positions[i], start, soft_cap, slopes[i], out[i], total[i]
            )
    for i in range(count):
        out[i] += np.log(max(total[i], np.float32(1e-37)))


@njit(fastmath=FASTMATH, error_model="numpy", cache=True)
def _pool(q, pages, table, kv, keys, bounds, soft_cap, slope, lse, value):
    """Mass of the `keys` within `bounds`; their weighted values are added into `value`."""
    head_dim, mass = q.shape[0], np.float32(0)
    first, last = bounds
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


@njit(inline="always", fastmath=FASTMATH)
def _add_sink(lse, sink):
    high = max(lse, sink)
    return high + np.log(_exp(lse - high) + _exp(sink - high))


@njit(fastmath=FASTMATH, error_model="numpy", cache=True)
def _gather(query, scale, token, chosen, q):
    """Scaled float32 queries of the tile's rows and chosen heads, row by row."""
    for i in range(q.shape[0]):
        row = query[token[i // chosen.shape[0]], chosen[i % chosen.shape[0]]]
        for d in range(q.shape[1]):
            q[i, d] = _widen(row[d]) * scale


@njit(fastmath=FASTMATH, error_model="numpy", cache=True)
def _tile(
    q, chosen, position, pages, table, kv, keys, offsets, shape, alibi_slopes, sinks, mass, value
):
    """Partials of one tile and KV head; `q` is in the order of `_gather`, `shape` is
    `(soft_cap, window)`."""
    count, heads = q.shape[0], chosen.shape[0]
    soft_cap, window = shape
    positions = np.repeat(position.astype(np.int64), heads)
    first = np.zeros(count, np.int64)
    if window > 0:
        first[:] = np.maximum(positions - window + 1, 0)
    slopes, lse = np.zeros(count, np.float32), np.empty(count, np.float32)
    if alibi_slopes.shape[0]:
        for i in range(count):
            slopes[i] = alibi_slopes[chosen[i % heads]]
    _log_sum_exp(q, positions, first, slopes, pages, table, kv, soft_cap, lse)
    for i in range(count):
        r, h = i // heads, chosen[i % heads]
        total = _add_sink(lse[i], sinks[h]) if sinks.shape[0] else lse[i]
        for g in range(offsets.shape[0] - 1):
            pool, target = keys[offsets[g] : offsets[g + 1]], value[r, h, g]
            bounds = first[i], positions[i]
            mass[r, h, g] = _pool(
                q[i], pages, table, kv, pool, bounds, soft_cap, slopes[i], total, target
            )


@njit(parallel=True, fastmath=FASTMATH, error_model="numpy", cache=True)
def partials(
    query, scale, pages, block_table, rows, keys, offsets, heads, shape, slopes, sinks, mass, value
):
    """Fill every element of `mass` and `value`.

    `rows` is `(token, request, slot, position, tiles)`, `shape` is `(soft_cap, window)`.
    """
    token, request, slot, position, tiles = rows
    kv_heads, head_dim = pages.shape[1], query.shape[2]
    group = query.shape[1] // kv_heads
    for task in prange((tiles.shape[0] - 1) * kv_heads):
        tile, kv = task // kv_heads, task % kv_heads
        begin, end = tiles[tile], tiles[tile + 1]
        s, head = slot[begin], kv * group
        mass[begin:end, head : head + group] = 0
        value[begin:end, head : head + group] = 0
        chosen = head + np.flatnonzero(heads[s, head : head + group])
        if chosen.shape[0] == 0:
            continue
        q = np.empty(((end - begin) * chosen.shape[0], head_dim), np.float32)
        _gather(query, scale, token[begin:end], chosen, q)
        _tile(
            q,
            chosen,
            position[begin:end],
            pages,
            block_table[request[begin]],
            kv,
            keys,
            offsets[s],
            shape,
            slopes,
            sinks,
            mass[begin:end],
            value[begin:end],
        )


@njit(parallel=True, fastmath=FASTMATH, error_model="numpy", cache=True)
def combine(output, token, heads, value, factors, rest, finite):
    """`O' = c_rest O + sum_g (c_g - c_rest) U_g` on the selected heads, in place.

    A result that is not finite is not written, and clears the row's flag in `finite`.
    """
    for r in prange(token.shape[0]):
        x = np.empty(output.shape[2], np.float32)
        for h in range(output.shape[1]):
            if not heads[r, h]:
                continue
            row = output[token[r], h]
            for d in range(row.shape[0]):
                x[d] = rest[r, h] * _widen(row[d])
            for g in range(value.shape[2]):
                factor = factors[r, h, g] - rest[r, h]
                for d in range(row.shape[0]):
                    x[d] += factor * value[r, h, g, d]
            check = np.float32(0)
            for d in range(row.shape[0]):
                check += x[d] * np.float32(0)
            if check == 0:
                _store(row, x)
            else:
                finite[r] = False
