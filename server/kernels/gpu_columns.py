"""Column means of attention over the paged cache, in Triton.

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
    slopes_of,
    visible,
)


@triton.jit(do_not_specialize=["count"])
def column_means(
    query,
    cache,
    rows,
    heads,
    model,
    ends,
    lse,
    out,
    count,
    FORM: tl.constexpr,
    LANES: tl.constexpr,
):
    """Mean probability of the keys of a tile's positions for one query head.

    Grid `(tiles, query_heads)`, each a tile's keys; a tile has at most `BLOCK_N` rows. `ends` int32
    `[tiles]` is one past the last row of the tile's slot. Sums over thousands of rows are in
    float64, those of a block of rows in float32. Where a head is not selected nothing is written.
    """
    tile, head, query_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    begin, end, stop = tl.load(rows[4] + tile), tl.load(rows[4] + tile + 1), tl.load(ends + tile)
    slot, request = tl.load(rows[2] + begin), tl.load(rows[1] + begin)
    if tl.load(heads + slot * query_heads + head) == 0:
        return
    kv, n = head // FORM[0], tl.arange(0, FORM[4])
    key, seen = tl.load(rows[3] + begin) + n, begin + n < end
    k = load_keys(cache, places(cache, request, key, kv, seen, FORM), seen, FORM)
    total = tl.full([FORM[4]], 0.0, tl.float64)
    for low in range(begin, stop, LANES[1]):
        # One head, one column: every lane is a row.
        lane, _, token = lanes(rows, heads, low, stop, head, 1, 1, LANES[1])
        row, head_of, valid, _ = lane
        q = load_query(query, token, head_of, valid, FORM)
        x = logits(q, k, lane, key, slopes_of(model[1], head_of, valid, FORM), model[0], FORM)
        level = tl.load(lse + row.to(tl.int64) * query_heads + head, mask=valid, other=0.0)
        p = power_at_most_one(visible(x, lane, key, seen, model[0][2]) - level[:, None])
        total += tl.sum(p, 0).to(tl.float64)
    mean = (total / (stop - begin - n)).to(tl.float32)
    tl.store(out + head.to(tl.int64) * count + begin + n, mean, mask=seen)
