"""Adding pooled keys to the sums of the queries that see them, compiled.

Pages of which pools have many keys are taken as a whole: keys lie column by column, so that logits
of a stretch of them vectorise, and those of one key do not.

Untyped, because numba compiles each function per argument types; shapes are those of
`server.kernels.partials`. Logits are in base 2.
"""

import numpy as np
from numba import njit

from server.kernels.cpu_elements import power, widen
from server.kernels.cpu_fold import many, pooled_keys
from server.kernels.cpu_pools import shape
from server.kernels.cpu_stretch import MOST, add_values, score_one
from server.kernels.cpu_tiles import dot, load_key
from server.kernels.cpu_vector import HEADROOM, LOWEST

_HEADROOM = np.float32(HEADROOM)
_LOWEST = np.float32(LOWEST)


@njit(inline="always")
def raise_peak(x, i, peak, mass, value):
    """Scale what was summed of query `i` where the logit `x` lies far above its peak; rare."""
    if x > peak[i] + _HEADROOM:
        scale = power(peak[i] - x)
        peak[i] = x
        for column in range(mass.shape[0]):
            mass[column] *= scale
            for d in range(value.shape[1]):
                value[column, d] *= scale


@njit(inline="always")
def _add(p, weight, values, j, column, beside, mass, value):
    """Add a key to a column; its weight, if any, to the one that is `beside` columns on."""
    mass[column] += p
    for d in range(value.shape[1]):
        value[column, d] += p * widen(values[j, d])
    if weight != 0:
        mass[column + beside] += weight * p
        for d in range(value.shape[1]):
            value[column + beside, d] += weight * p * widen(values[j, d])


@njit(inline="always")
def _counts(x, lse, above, position):
    """Whether a logit is above a pool's threshold, if it has one."""
    if above[0] < 0:
        return True
    least = above[0] + above[1] / np.float32(position + 1)
    return not power(min(x - lse, np.float32(0))) <= least


@njit(inline="always")
def _take_key(key, weight, queries, seen, kind, page, pool, numbers, given, m, u):
    """One key for every query of a kind; `page` is `(keys, values, start)`, `pool` of one."""
    begin, end, heads, low, high = kind
    lse, peak, k = given[:3]
    positions, first, slopes = seen[2:5]
    column, beside, above = pool
    j, block = key - page[2], page[1].shape[0]
    load_key(queries, page[0], j, block, k)
    for r in range(begin, end):
        for c in range(low, high):
            i, h = (r - begin) * heads.shape[0] + c, heads[c]
            if key < first[i] or key > positions[i]:
                continue
            distance = np.float32(key - positions[i])
            x = shape(dot(queries, i, k) * numbers[0], numbers[1], slopes[i], distance)
            mass, value = m[r, h], u[r, h]
            raise_peak(x, i, peak, mass, value)
            p = power(x - peak[i])
            if above[0] < 0 or _counts(x, lse[r, h], above, positions[i]):
                _add(p, weight, page[1], j, column, beside, mass, value)
            else:
                _add(p, np.float32(0), page[1], j, mass.shape[0] - 1, beside, mass, value)


@njit(inline="always")
def _logits(queries, i, seen, page, numbers, low, high, x):
    """Logits of a page into `x`; the highest of `low..high`."""
    keys, values, start = page
    slope, before, cap = seen[4][i], np.float32(start - seen[2][i]), numbers[1]
    keys = keys.reshape(values.shape[1], values.shape[0])
    score_one(queries, i, 1, keys, keys, high, x)
    highest = _LOWEST
    if cap > 0:
        for j in range(high):
            x[j] = shape(x[j] * numbers[0], cap, slope, before + np.float32(j))
    else:
        for j in range(high):
            x[j] = x[j] * numbers[0] + slope * (before + np.float32(j))
    for j in range(low, high):
        highest = max(highest, x[j])
    return highest


# Loops over keys begin at 0: an index that might be negative keeps the compiler from vectors.
@njit(inline="always")
def _divide(p, high, owners, weights, pools, shares, mass):
    """Powers by column into `shares`, and their sums into the mass."""
    columns = shares.shape[0]
    for column in range(columns):
        beside = pools <= column < columns - 1
        owner = np.float32(column - pools if beside else min(column, pools))
        total = np.float32(0)
        for j in range(high):
            share = p[j] if owners[j] == owner else np.float32(0)
            shares[column, j] = share * weights[j] if beside else share
            total += shares[column, j]
        mass[column] += total


@njit(inline="always")
def _take_page(queries, seen, kind, page, above, numbers, given, m, u):
    """A page for every query of a kind: marked keys to their pools, others to the rest."""
    begin, end, heads, low, high = kind
    lse, peak, _, owners, weights, x, p, own, shares = given
    positions, first, values, start = seen[2], seen[3], page[1], page[2]
    pools = above.shape[0]
    for r in range(begin, end):
        for c in range(low, high):
            i, h = (r - begin) * heads.shape[0] + c, heads[c]
            a, b = max(first[i] - start, 0), min(positions[i] - start + 1, values.shape[0])
            if a >= b:
                continue
            mass, value = m[r, h], u[r, h]
            raise_peak(_logits(queries, i, seen, page, numbers, a, b, x), i, peak, mass, value)
            for j in range(b):
                p[j] = power(x[j] - peak[i]) if j >= a else np.float32(0)
                own[j] = owners[j]
            for g in range(pools):
                if above[g, 0] >= 0:
                    for j in range(b):
                        if owners[j] == g and not _counts(x[j], lse[r, h], above[g], positions[i]):
                            own[j] = pools
            _divide(p, b, own, weights, pools, shares, mass)
            for column in range(0, shares.shape[0], MOST):
                count = min(MOST, shares.shape[0] - column)
                add_values(shares, values, values, column, count, b, value)


@njit(inline="always")
def mark(ways, n, pools, start, owners, weights):
    """Whose the keys from `start` on are, and their weights; `pools` where they are of none."""
    keys, given = pools[0], pools[2]
    bounds, spans = ways[:2]
    stop = start + owners.shape[0]
    owners[:], weights[:] = spans.shape[1], 0
    for g in range(spans.shape[1]):
        for key in range(max(spans[n, g, 0], start), min(spans[n, g, 1], stop)):
            owners[key - start] = g
        at = bounds[n, g]
        listed = keys[at : bounds[n, g + 1]]
        for e in range(np.searchsorted(listed, start), np.searchsorted(listed, stop)):
            owners[listed[e] - start] = g
            if given.shape[0]:
                weights[listed[e] - start] = given[at + e]


@njit(inline="always")
def _take_keys(queries, seen, kind, page, ways, n, pools, above, numbers, given, m, u):
    """The few keys that pools have of a page, one by one."""
    keys, weights = pools[0], pools[2]
    bounds, spans = ways[:2]
    start, stop = page[2], page[2] + page[1].shape[0]
    for g in range(spans.shape[1]):
        pool = g, spans.shape[1], above[g]
        a, b = max(spans[n, g, 0], start), min(spans[n, g, 1], stop)
        at, listed = bounds[n, g], keys[bounds[n, g] : bounds[n, g + 1]]
        low, high = np.searchsorted(listed, start), np.searchsorted(listed, stop)
        for e in range(min(a - b, 0), high - low):
            key = np.int64(listed[low + e]) if e >= 0 else np.int64(b + e)
            weight = np.float32(0)
            if e >= 0 and weights.shape[0]:
                weight = weights[at + low + e]
            _take_key(key, weight, queries, seen, kind, page, pool, numbers, given, m, u)


@njit(inline="always")
def measure(queries, count, seen, part, pages, table, kv, ways, pools, numbers, given, m, u):
    """Add to the sums of a tile's queries what `fold_pages` left out of the rest.

    Those are the keys that pools have, and all other keys of pages of which they have many. Keys
    that are not above their pool's threshold count with the rest.

    `part` is `(begin, end, heads)`; `ways` is `(bounds, spans, starts, sets)` of each kind of
    query: its pools, the first of its heads, its set; `given` is `(log-sum-exps, peaks)`, buffers.
    """
    bounds, spans, starts, sets = ways
    positions, first, dim = seen[2], seen[3], given[2].shape[0]
    block = pages.shape[3] // dim
    for index in range(first[0] // block, positions[count - 1] // block + 1):
        start = index * block
        some = pooled_keys(pools[0], bounds, spans, start, start + block)
        if some == 0:
            continue
        values = pages[table[index], kv, 1].reshape(block, dim)
        page = pages[table[index], kv, 0], values, start
        for n in range(sets.shape[0]):
            kind, above = (*part, starts[n], starts[n + 1]), pools[4][sets[n]]
            if some >= many(block):
                mark(ways, n, pools, start, given[3], given[4])
                _take_page(queries, seen, kind, page, above, numbers, given, m, u)
            else:
                _take_keys(queries, seen, kind, page, ways, n, pools, above, numbers, given, m, u)
