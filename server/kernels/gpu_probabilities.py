"""Probabilities of some keys over the paged cache, in Triton.

Untyped, because Triton compiles each function per argument types; shapes are those of
`server.kernels.partials`, groups of arguments those of `server.kernels.gpu_logits`.
"""

import triton
import triton.language as tl

from server.kernels.gpu_logits import (
    lanes,
    load_keys,
    load_query,
    logits,
    places,
    power_at_most_one,
    reach,
    slopes_of,
    visible,
)


@triton.jit(do_not_specialize=["parts", "count", "wanted"])
def probabilities(
    query,
    cache,
    rows,
    heads,
    model,
    lse,
    keys,
    out,
    parts,
    count,
    wanted,
    FORM: tl.constexpr,
    LANES: tl.constexpr,
):
    """Fill `out` float32 `[query_heads, count, wanted]` where heads are selected.

    Grid `(tiles * parts, kv_heads, blocks of keys)`; `keys` int32 `[wanted]`, positions.
    """
    tile, kv = tl.program_id(0) // parts, tl.program_id(1)
    begin = tl.load(rows[4] + tile) + tl.program_id(0) % parts * LANES[0]
    end = tl.minimum(tl.load(rows[4] + tile + 1), begin + LANES[0])
    if begin >= end:
        return
    lane, _, token = lanes(rows, heads, begin, end, kv, FORM[0], 1, LANES[1])
    row, head, valid, _ = lane
    first, last = reach(lane, model[0][2])
    n = tl.program_id(2) * FORM[4] + tl.arange(0, FORM[4])
    key = tl.load(keys + n, mask=n < wanted, other=-1)
    seen = (key >= first) & (key <= last)
    request, query_heads = tl.load(rows[1] + begin), tl.num_programs(1) * FORM[0]
    k = load_keys(cache, places(cache, request, key, kv, seen, FORM), seen, FORM)
    q, slope = load_query(query, token, head, valid, FORM), slopes_of(model[1], head, valid, FORM)
    x = visible(logits(q, k, lane, key, slope, model[0], FORM), lane, key, seen, model[0][2])
    level = tl.load(lse + row.to(tl.int64) * query_heads + head, mask=valid, other=0.0)
    p = power_at_most_one(x - level[:, None])
    at = (head.to(tl.int64) * count + row)[:, None] * wanted + n[None, :]
    tl.store(out + at, p, mask=valid[:, None] & (n < wanted)[None, :])
