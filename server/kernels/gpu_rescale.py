"""Rescaling of a pool, in Triton: in one pass over the keys, or from a known log-sum-exp.

Untyped, because Triton compiles each function per argument types; shapes are those of
`server.kernels.partials`, groups of arguments those of `server.kernels.gpu_logits`. `done` is
`(count, before, after, finite)`.
"""

import triton
import triton.language as tl

from server.kernels.gpu_logits import (
    LOG2E,
    lanes,
    load_keys,
    load_query,
    load_values,
    logits,
    places,
    power_at_most_one,
    reach,
    slopes_of,
    visible,
)
from server.kernels.gpu_partials import gathered, sink_of

# Where less mass than this is left for the other keys, a row has nothing to trade with.
NOTHING_LEFT = tl.constexpr(1e-6)


@triton.jit
def _add(done, at, counted, before, after):
    """Account for rewritten outputs; each place belongs to one program."""
    tl.store(done[0] + at, tl.load(done[0] + at, mask=counted, other=0) + 1, mask=counted)
    tl.store(done[1] + at, tl.load(done[1] + at, mask=counted, other=0.0) + before, mask=counted)
    tl.store(done[2] + at, tl.load(done[2] + at, mask=counted, other=0.0) + after, mask=counted)


@triton.jit(do_not_specialize=["chunk", "count"])
def finish(
    rows,
    heads,
    factor,
    computed,
    model,
    sums,
    output,
    done,
    chunk,
    count,
    FORM: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Write rescaled attention from what `divide` has summed of one pool and the rest.

    Grid `(count, query_heads)`. `heads` is what to rescale; `output` is `(pointer, stride of
    tokens, of heads)`. The stock output is not read: it stays where `computed` is not set and a
    head is not selected, its pool is not seen or its factor is 1.
    """
    row, head, query_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    slot, token = tl.load(rows[2] + row), tl.load(rows[0] + row)
    selected = tl.load(heads + slot * query_heads + head) != 0
    new = tl.load(computed + slot) != 0
    if ((selected | new) & (token >= 0)) == 0:
        return
    WIDTH: tl.constexpr = (2, 2, 1)
    window = model[0][2]
    peak, total, value = gathered(rows, row, head, sums, window, chunk, count, FORM, WIDTH)
    f = tl.where(selected, tl.load(factor + slot * query_heads + head), 1.0)
    good = (f > 0) & (f < float("inf"))
    f = tl.where(good, f, 1.0)
    sink = sink_of(model[2], head, SINKS)
    level = tl.maximum(tl.max(peak, 0), sink)
    share, pooled = tl.exp2(peak - level), tl.arange(0, 2) == 0
    pool = tl.sum(tl.where(pooled, total * share, 0.0), 0)
    rest = tl.sum(tl.where(pooled, 0.0, total * share), 0) + tl.exp2(sink - level)
    whole = f * pool + rest
    x = tl.sum(value * tl.where(pooled, f * share, share)[:, None], 0) / whole
    finite = tl.sum(x * 0.0, 0) == 0
    mass = pool / (pool + rest)
    counted = selected & (mass != 0)
    d = tl.arange(0, FORM[2])
    place = output[0] + token * output[1] + head * output[2] + d
    written = new | (counted & (f != 1) & finite)
    tl.store(place, x.to(output[0].dtype.element_ty), mask=(d < FORM[1]) & written)
    tl.store(done[3] + row, 0, mask=(finite & good) == 0)
    _add(done, row.to(tl.int64) * query_heads + head, counted, mass, f * pool / whole)


@triton.jit
def _measured(q, slope, lane, cache, request, kv, pool, level, numbers, FORM: tl.constexpr):
    """Mass `[M]` and value sum `[M, BLOCK_D]` of the keys `pool = (keys, begin, stop)`."""
    mass = tl.full(level.shape, 0.0, tl.float32)
    sums = tl.full(q.shape, 0.0, tl.float32)
    first, last = reach(lane, numbers[2])
    for low in range(pool[1], pool[2], FORM[4]):
        n = low + tl.arange(0, FORM[4])
        key = tl.load(pool[0] + n, mask=n < pool[2], other=-1)
        seen = (key >= first) & (key <= last)
        place = places(cache, request, key, kv, seen, FORM)
        x = logits(q, load_keys(cache, place, seen, FORM), lane, key, slope, numbers, FORM)
        p = power_at_most_one(visible(x, lane, key, seen, numbers[2]) - level[:, None])
        mass += tl.sum(p, 1)
        v = load_values(cache, place, seen, FORM)
        # In two parts, which keep 16 bits: a pool of one key is rounded once, as its value.
        high = p.to(v.dtype)
        sums += tl.dot(high, v, input_precision="ieee")
        sums += tl.dot((p - high.to(tl.float32)).to(v.dtype), v, input_precision="ieee")
    return mass, sums


@triton.jit
def _lerp(factor, mass):
    """`1 + (factor - 1) mass`, exact at factor 1 and to all digits where the mass is nearly 1."""
    above = factor - (factor - 1.0) * (1.0 - mass)
    return tl.where(mass < 0.5, 1.0 + mass * (factor - 1.0), above)


@triton.jit(do_not_specialize=["parts"])
def correct(
    query,
    cache,
    rows,
    heads,
    factor,
    model,
    pool,
    log_sum_exp,
    output,
    done,
    parts,
    FORM: tl.constexpr,
    LANES: tl.constexpr,
):
    """Rescale the stock output: `O' = O / D + (f - 1) / D U` with `D = 1 + (f - 1) m`.

    Reads the keys of the pool alone. Grid `(tiles * parts, kv_heads)`. `pool` is `(keys, offsets)`;
    `log_sum_exp` is `(pointer, stride of heads)` of natural logarithms `[query_heads, tokens]`.
    """
    tile, kv = tl.program_id(0) // parts, tl.program_id(1)
    begin = tl.load(rows[4] + tile) + tl.program_id(0) % parts * LANES[0]
    end = tl.minimum(tl.load(rows[4] + tile + 1), begin + LANES[0])
    if begin >= end:
        return
    lane, _, token = lanes(rows, heads, begin, end, kv, FORM[0], 1, LANES[1])
    row, head, valid, _ = lane
    slot, request = tl.load(rows[2] + begin), tl.load(rows[1] + begin)
    query_heads = tl.num_programs(1) * FORM[0]
    given = pool[0], tl.load(pool[1] + slot * 2), tl.load(pool[1] + slot * 2 + 1)
    where = log_sum_exp[0] + head * log_sum_exp[1] + token
    level = tl.load(where, mask=valid, other=0.0) * LOG2E
    q, slope = load_query(query, token, head, valid, FORM), slopes_of(model[1], head, valid, FORM)
    mass, value = _measured(q, slope, lane, cache, request, kv, given, level, model[0], FORM)
    f = tl.load(factor + slot * query_heads + head, mask=valid, other=1.0)
    good = (f > 0) & (f < float("inf"))
    f = tl.where(good & (1.0 - mass > NOTHING_LEFT), f, 1.0)
    keep = 1.0 / _lerp(f, mass)
    d = tl.arange(0, FORM[2])
    place = output[0] + (token * output[1] + head * output[2])[:, None] + d[None, :]
    mask = (valid & (mass != 0) & (f != 1))[:, None] & (d[None, :] < FORM[1])
    stock = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    x = keep[:, None] * stock + (f * keep - keep)[:, None] * value
    finite = tl.sum(x * 0.0, 1) == 0
    tl.store(place, x.to(output[0].dtype.element_ty), mask=mask & finite[:, None])
    tl.store(done[3] + row, tl.full(row.shape, 0, tl.int8), mask=valid & ((finite & good) == 0))
    at = row.to(tl.int64) * query_heads + head
    _add(done, at, valid & (mass != 0), mass, f * keep * mass)
