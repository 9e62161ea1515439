"""The combination of pools and the rest, in Triton.

Untyped, because Triton compiles each function per argument types; shapes are those of
`server.kernels.partials`.
"""

import triton
import triton.language as tl


@triton.jit
def _changes(factors, given, c, POOLS: tl.constexpr, COLUMNS: tl.constexpr):
    """Whether any pool or the rest does not keep what it has, or weights add anything."""
    neutral = tl.where((c >= POOLS) & (c < COLUMNS - 1), 0.0, 1.0)
    return tl.max((given & (factors != neutral)).to(tl.int32), 0) != 0


@triton.jit
def combine(
    output,
    token,
    heads,
    value,
    factors,
    finite,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    POOLS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum the columns of a row and head into `output`; without pools, scale what is there.

    Grid `(rows, query_heads)`. `output` is `(pointer, stride of tokens, of heads)`; `heads` bool
    `[rows, query_heads]`. Columns from `POOLS` up to the last are weighted. Where the factors
    change nothing `output` keeps every bit: the sum would be rounded otherwise. A result that is
    not finite is not written, and clears the row's flag in `finite`.
    """
    row, head = tl.program_id(0), tl.program_id(1)
    at = row.to(tl.int64) * tl.num_programs(1) + head
    where = tl.load(token + row)
    if ((tl.load(heads + at) != 0) & (where >= 0)) == 0:
        return
    c, d = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D)
    given, inside = c < COLUMNS, d < DIM
    scale = tl.load(factors + at * COLUMNS + c, mask=given, other=0.0)
    if _changes(scale, given, c, POOLS, COLUMNS) == 0:
        return
    place = output[0] + where * output[1] + head * output[2] + d
    if POOLS:
        each = (at * COLUMNS + c)[:, None] * DIM + d[None, :]
        parts = tl.load(value + each, mask=given[:, None] & inside[None, :], other=0.0)
        x = tl.sum(parts * scale[:, None], 0)
    else:
        x = tl.load(place, mask=inside, other=0.0).to(tl.float32) * tl.sum(scale, 0)
    good = tl.sum(x * 0.0, 0) == 0
    tl.store(place, x.to(output[0].dtype.element_ty), mask=inside & good)
    tl.store(finite + row, 0, mask=good == 0)
