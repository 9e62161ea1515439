"""Logits over a paged cache of any strides, as every Triton kernel here forms them.

Logits and log-sum-exps are in base 2. Untyped, because Triton compiles each function per argument
types; shapes are those of `server.kernels.partials`. `M` are lanes, which are queries, and `N`
keys. A lane is `(row, head, valid, position)`, each `[M]`. Arguments in groups:

- `query`: pointer, stride of tokens, stride of heads
- `cache`: keys, values, strides of pages, heads and slots, block table, its stride
- `rows`: `(token, request, slot, position, tiles)`
- `model`: `((scale, soft cap, window), slopes, sinks)`, not in base 2
- `FORM`: `(GROUP, DIM, BLOCK_D, PAGE, BLOCK_N, CAPPED, ALIBI)`, which a model never changes
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
NEVER = tl.constexpr(float("-inf"))


@triton.jit
def lanes(rows, heads, begin, end, kv, GROUP: tl.constexpr, COLUMNS: tl.constexpr, M: tl.constexpr):
    """Lanes of rows `begin <= r < end` of one request, their columns and tokens.

    The heads of a KV head lie within a row and columns within a head. Not valid are heads that are
    not selected and rows with the token -1.
    """
    m = tl.arange(0, M)
    row = begin + m // (GROUP * COLUMNS)
    head = kv * GROUP + (m // COLUMNS) % GROUP
    valid = row < end
    token = tl.load(rows[0] + row, mask=valid, other=-1)
    valid = valid & (token >= 0)
    slot = tl.load(rows[2] + begin)
    chosen = tl.load(heads + slot * tl.num_programs(1) * GROUP + head, mask=valid, other=0)
    valid = valid & (chosen != 0)
    position = tl.load(rows[3] + row, mask=valid, other=-1)
    return (row, head, valid, position), m % COLUMNS, token


@triton.jit
def reach(lane, window):
    """First and last key that any lane sees; the last is -1 where none is valid."""
    _, _, valid, position = lane
    first = tl.where(valid, first_key(position, window), 2147483647)
    return tl.min(first, 0), tl.max(position, 0)


@triton.jit
def first_key(position, window):
    """The first key that a row sees; `window` 0 for all."""
    return tl.where(window > 0, tl.maximum(position - window + 1, 0), 0)


@triton.jit
def load_query(query, token, head, valid, FORM: tl.constexpr):
    """`[M, BLOCK_D]`, zero where not valid."""
    d = tl.arange(0, FORM[2])
    start = token * query[1] + head * query[2]
    mask = valid[:, None] & (d[None, :] < FORM[1])
    return tl.load(query[0] + start[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def places(cache, request, key, kv, seen, FORM: tl.constexpr):
    """Offsets of `key` `[N]` in the cache, in 64 bits: it may have more than 2^31 elements."""
    row = cache[5] + request.to(tl.int64) * cache[6]
    page = tl.load(row + key // FORM[3], mask=seen, other=0).to(tl.int64)
    return page * cache[2] + kv.to(tl.int64) * cache[3] + (key % FORM[3]) * cache[4]


@triton.jit
def load_keys(cache, place, seen, FORM: tl.constexpr):
    """`[BLOCK_D, N]`, a column per key; zero where not seen, since pages may hold anything."""
    d = tl.arange(0, FORM[2])
    mask = seen[None, :] & (d[:, None] < FORM[1])
    return tl.load(cache[0] + place[None, :] + d[:, None], mask=mask, other=0.0)


@triton.jit
def load_values(cache, place, seen, FORM: tl.constexpr):
    """`[N, BLOCK_D]`; zero where not seen: nothing times a stale NaN would be NaN."""
    d = tl.arange(0, FORM[2])
    mask = seen[:, None] & (d[None, :] < FORM[1])
    return tl.load(cache[1] + place[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def slopes_of(slopes, head, valid, FORM: tl.constexpr):
    """ALiBi slopes of lanes `[M]` in base 2; zero for none."""
    if FORM[6]:
        return tl.load(slopes + head, mask=valid, other=0.0) * LOG2E
    return tl.full(head.shape, 0.0, tl.float32)


@triton.jit
def logits(q, k, lane, key, slope, numbers, FORM: tl.constexpr):
    """`[M, N]` of queries `[M, D]` and keys `[D, N]`, products summed in float32."""
    # ieee: float32 would be rounded to 11 bits otherwise. Other types are exact either way.
    x = tl.dot(q, k, input_precision="ieee") * (numbers[0] * LOG2E)
    if FORM[5]:
        limit = numbers[1] * LOG2E
        # tanh by a power that cannot overflow.
        t = tl.exp2(tl.abs(x) * (-2.0 * LOG2E) / limit)
        bounded = limit * (1.0 - t) / (1.0 + t)
        x = tl.where(x < 0, -bounded, bounded)
    if FORM[6]:
        x += slope[:, None] * (key[None, :] - lane[3][:, None]).to(tl.float32)
    return x


@triton.jit
def visible(x, lane, key, seen, window):
    """Logits of the keys that a lane sees, never for others."""
    _, _, valid, position = lane
    inside = (key[None, :] <= position[:, None]) & (valid[:, None] & seen[None, :])
    inside = inside & (key[None, :] >= first_key(position, window)[:, None])
    return tl.where(inside, x, NEVER)


@triton.jit
def power_at_most_one(x):
    """`2^x` of logits less their log-sum-exp, 1 where rounding put them above 0; NaN stays."""
    return tl.exp2(tl.where(x > 0, 0.0, x))
