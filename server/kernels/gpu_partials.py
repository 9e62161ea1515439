"""Attention rows divided into pools and the rest, over the paged cache, in Triton.

A column of a row, which is a pool or the rest, is attention over the keys that belong to it. So
each is a lane of the matrix product, with a running peak and sums of its own: decoding has lanes to
spare, since a product takes 16 at least, and a column of small probabilities keeps its digits
beside one of large ones. A weight of a key is a bias of its logit and a sign.

Long rows are split over programs, whose sums `reduce` brings together.

Untyped, because Triton compiles each function per argument types; shapes are those of
`server.kernels.partials`. Logits are in base 2.
"""

import triton
import triton.language as tl

from server.kernels.gpu_logits import (
    LOG2E,
    NEVER,
    first_key,
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


@triton.jit
def _search(keys, begin, end, key, steps):
    """Where `key` `[N]` is or would be in the ascending `keys[begin:end]` of a lane; `[M, N]`."""
    low = begin[:, None] + key[None, :] * 0
    high = end[:, None] + key[None, :] * 0
    for _ in range(steps):
        open = low < high
        middle = (low + high) // 2
        less = tl.load(keys + middle, mask=open, other=0) < key[None, :]
        high = tl.where(open & (less == 0), middle, high)
        low = tl.where(open & less, middle + 1, low)
    return low


@triton.jit
def _counts(x, known, lane, above, n, NARROWED: tl.constexpr):
    """Whether probabilities are above the threshold of pool `n` `[M]`."""
    if NARROWED:
        least = tl.load(above + n * 2) + tl.load(above + n * 2 + 1) / (lane[3] + 1).to(tl.float32)
        p = power_at_most_one(x - known[:, None])
        # Not `p > least`: a NaN counts and so shows in the result.
        return (least < 0)[:, None] | ((p <= least[:, None]) == 0)
    return tl.full(x.shape, 1, tl.int1)


@triton.jit
def _belong(x, pools, chosen, column, lane, key, known, steps, KIND: tl.constexpr):
    """Logits of the keys that belong to a lane's column, never for others; their signs.

    `chosen` `[M]` is each lane's set; `KIND` is `(pools, weighted, narrowed)`.
    """
    keys, offsets, weights, spans, above = pools[0], pools[1], pools[2], pools[3], pools[4]
    mine = tl.full(x.shape, 0, tl.int1)
    taken, minus, bias = mine, mine, tl.full(x.shape, 0.0, tl.float32)
    for g in tl.static_range(KIND[0]):
        n = chosen * KIND[0] + g
        begin = tl.load(offsets + n + chosen)
        stop = tl.load(offsets + n + chosen + 1)
        at = _search(keys, begin, stop, key, steps)
        listed = at < stop[:, None]
        listed = listed & (tl.load(keys + at, mask=listed, other=-1) == key[None, :])
        spanned = key[None, :] >= tl.load(spans + n * 2)[:, None]
        spanned = spanned & (key[None, :] < tl.load(spans + n * 2 + 1)[:, None])
        inside = (listed | spanned) & _counts(x, known, lane, above, n, KIND[2])
        taken = taken | inside
        mine = mine | (inside & (column == g)[:, None])
        if KIND[1]:
            beside = inside & (column == KIND[0] + g)[:, None]
            weight = tl.load(weights + at, mask=listed & beside, other=0.0)
            bias = tl.where(beside, tl.log2(tl.abs(weight)), bias)
            minus = minus | (weight < 0)
            mine = mine | beside
    rest = (column == KIND[0] * (1 + KIND[1]))[:, None]
    return tl.where(tl.where(rest, taken == 0, mine), x + bias, NEVER), minus


@triton.jit
def _fold(x, minus, peak, total, sums, v, VALUES: tl.constexpr):
    """Take a block of logits into the running sums of their lanes."""
    highest = tl.maximum(peak, tl.max(x, 1))
    level = tl.where(highest == NEVER, 0.0, highest)
    p = tl.exp2(x - level[:, None])
    p = tl.where(minus, -p, p)
    shrink = tl.exp2(peak - level)
    total = total * shrink + tl.sum(p, 1)
    if VALUES:
        # Rounded to the type of the values, as stock kernels do.
        sums = sums * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return highest, total, sums


@triton.jit
def _lane_sets(pools, lane, slot, query_heads):
    """The set of pools of each lane; `lane` is `(row, head, valid, position)`."""
    sets, prompts = pools[5], pools[6]
    _, head, valid, position = lane
    generated = (position >= tl.load(prompts + slot)).to(tl.int32)
    return tl.load(sets + (slot * 2 + generated) * query_heads + head, mask=valid, other=0)


@triton.jit
def _store(out, at, valid, peak, total, sums, FORM: tl.constexpr, VALUES: tl.constexpr):
    """Put down what a program has summed; `at` `[M]` are places of lanes in `out`."""
    tl.store(out[0] + at, peak, mask=valid)
    tl.store(out[1] + at, total, mask=valid)
    if VALUES:
        d = tl.arange(0, FORM[2])
        where = at[:, None] * FORM[1] + d[None, :]
        tl.store(out[2] + where, sums, mask=valid[:, None] & (d[None, :] < FORM[1]))


@triton.jit(do_not_specialize=["chunk", "parts", "steps", "count"])
def divide(
    query,
    cache,
    rows,
    heads,
    model,
    pools,
    lse,
    out,
    chunk,
    parts,
    steps,
    count,
    FORM: tl.constexpr,
    LANES: tl.constexpr,
    KIND: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Sums of `2^(x - peak)` over the keys of each column, those of one split of a row.

    Grid `(tiles * parts, kv_heads, splits)`; split `s` has keys from `s * chunk` up to the next.
    `out` is `(peak, total, sums)`, float32 `[splits, count, query_heads, columns]`, the last with
    `head_dim` behind; nothing is written of a split that no row of the tile sees. `FORM` is
    `(GROUP, DIM, BLOCK_D, PAGE, BLOCK_N, CAPPED, ALIBI)` and `LANES` `(rows, lanes)` of a program.
    """
    COLUMNS: tl.constexpr = KIND[0] * (1 + KIND[1]) + 1
    tile, kv, split = tl.program_id(0) // parts, tl.program_id(1), tl.program_id(2)
    begin = tl.load(rows[4] + tile) + tl.program_id(0) % parts * LANES[0]
    end = tl.minimum(tl.load(rows[4] + tile + 1), begin + LANES[0])
    if begin >= end:
        return
    lane, column, token = lanes(rows, heads, begin, end, kv, FORM[0], COLUMNS, LANES[1])
    row, head, valid, _ = lane
    first, last = reach(lane, model[0][2])
    start, stop = tl.maximum(split * chunk, first), tl.minimum(split * chunk + chunk, last + 1)
    if start >= stop:
        return
    slot, request = tl.load(rows[2] + begin), tl.load(rows[1] + begin)
    query_heads = tl.num_programs(1) * FORM[0]
    chosen = _lane_sets(pools, lane, slot, query_heads)
    at = row.to(tl.int64) * query_heads + head
    q, slope = load_query(query, token, head, valid, FORM), slopes_of(model[1], head, valid, FORM)
    known = tl.load(lse + at, mask=valid, other=0.0) if KIND[2] else slope
    peak, total = tl.full([LANES[1]], NEVER, tl.float32), tl.full([LANES[1]], 0.0, tl.float32)
    sums = tl.full([LANES[1], FORM[2] if VALUES else 1], 0.0, tl.float32)
    for low in range(start, stop, FORM[4]):
        key = low + tl.arange(0, FORM[4])
        seen = key < stop
        place = places(cache, request, key, kv, seen, FORM)
        k = load_keys(cache, place, seen, FORM)
        x = logits(q, k, lane, key, slope, model[0], FORM)
        kept = visible(x, lane, key, seen, model[0][2])
        x, minus = _belong(kept, pools, chosen, column, lane, key, known, steps, KIND)
        v = load_values(cache, place, seen, FORM) if VALUES else k
        peak, total, sums = _fold(x, minus, peak, total, sums, v, VALUES)
    where = (split.to(tl.int64) * count * query_heads + at) * COLUMNS + column
    _store(out, where, valid, peak, total, sums, FORM, VALUES)


@triton.jit
def gathered(rows, row, head, sums, window, chunk, count, FORM: tl.constexpr, WIDTH: tl.constexpr):
    """What the splits of a row and head have summed, as one: `[C]`, `[C]` and `[C, BLOCK_D]`.

    `WIDTH` is `(columns, C, values)`, `C` a power of 2.
    """
    c, d = tl.arange(0, WIDTH[1]), tl.arange(0, FORM[2])
    position, query_heads = tl.load(rows[3] + row), tl.num_programs(1)
    peak, total = tl.full([WIDTH[1]], NEVER, tl.float32), tl.full([WIDTH[1]], 0.0, tl.float32)
    value = tl.full([WIDTH[1], FORM[2]], 0.0, tl.float32)
    for split in range(first_key(position, window) // chunk, position // chunk + 1):
        at = (row.to(tl.int64) + split * count) * query_heads + head
        where, given = at * WIDTH[0] + c, c < WIDTH[0]
        own = tl.load(sums[0] + where, mask=given, other=NEVER)
        highest = tl.maximum(peak, own)
        level = tl.where(highest == NEVER, 0.0, highest)
        before, now = tl.exp2(peak - level), tl.exp2(own - level)
        total = total * before + tl.load(sums[1] + where, mask=given, other=0.0) * now
        if WIDTH[2]:
            mask = given[:, None] & (d[None, :] < FORM[1])
            at = where[:, None] * FORM[1] + d[None, :]
            own_value = tl.load(sums[2] + at, mask=mask, other=0.0)
            value = value * before[:, None] + own_value * now[:, None]
        peak = highest
    return peak, total, value


@triton.jit
def sink_of(sinks, head, SINKS: tl.constexpr):
    """A head's learned logit in base 2; never for none."""
    return tl.load(sinks + head) * LOG2E if SINKS else NEVER


@triton.jit(do_not_specialize=["chunk", "count"])
def reduce(
    rows,
    heads,
    model,
    sums,
    out,
    chunk,
    count,
    FORM: tl.constexpr,
    KIND: tl.constexpr,
    WIDTH: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Bring the splits of a row and head together, and divide them by the row's total.

    Grid `(count, query_heads)`. `sums` is what `divide` put out; `out` is `(mass, value,
    log-sum-exp)`: float32 `[count, query_heads, columns]`, the same with `head_dim` behind, and
    `[count, query_heads]`. All of it is written, zeros where a head is not selected.
    """
    row, head, query_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    slot, token = tl.load(rows[2] + row), tl.load(rows[0] + row)
    chosen = (tl.load(heads + slot * query_heads + head) != 0) & (token >= 0)
    at, c = row.to(tl.int64) * query_heads + head, tl.arange(0, WIDTH[1])
    where, given = at * WIDTH[0] + c, c < WIDTH[0]
    d = tl.arange(0, FORM[2])
    mask, places = given[:, None] & (d[None, :] < FORM[1]), where[:, None] * FORM[1] + d[None, :]
    if not chosen:
        tl.store(out[0] + where, tl.full([WIDTH[1]], 0.0, tl.float32), mask=given)
        if WIDTH[2]:
            zeros = tl.full([WIDTH[1], FORM[2]], 0.0, tl.float32)
            tl.store(out[1] + places, zeros, mask=mask)
        tl.store(out[2] + at, 0.0)
        return
    window = model[0][2]
    peak, total, value = gathered(rows, row, head, sums, window, chunk, count, FORM, WIDTH)
    rest = c == WIDTH[0] - 1
    plain = (c < KIND[0]) | rest
    sink = sink_of(model[2], head, SINKS)
    level = tl.maximum(tl.max(tl.where(plain, peak, NEVER), 0), sink)
    share, gone = tl.exp2(peak - level), tl.exp2(sink - level)
    whole = tl.sum(tl.where(plain, total * share, 0.0), 0) + gone
    mass = (total * share + tl.where(rest, gone, 0.0)) / whole
    tl.store(out[0] + where, mass, mask=given)
    if WIDTH[2]:
        tl.store(out[1] + places, value * (share / whole)[:, None], mask=mask)
    tl.store(out[2] + at, level + tl.log2(whole))
