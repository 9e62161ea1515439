"""Softmax over pages of keys, and the sums of their values, written as LLVM vectors of 16 lanes.

What `fold` computes stays in registers from the dot products to the exponentials; compilers keep
neither the accumulators of a loop over keys nor a softmax in them. Logits are in base 2
throughout: `2^x` is cheaper than `e^x`.

numba's cache on disk knows only the file of the function it compiled: after a change here or in
`cpu_product.py` or `cpu_llvm.py`, touch the files that call `fold_pages`.
"""

from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from server.kernels.cpu_llvm import (
    CONTRACT,
    F32,
    I16,
    I64,
    LANES,
    VF32,
    VI16,
    VI32,
    across,
    at,
    each,
    lanes_from,
    larger,
    load,
    multiply_add,
    power,
    round_to_half,
    splat,
)
from server.kernels.cpu_product import Matrix, Rows, accumulators, add_products, multiply

# Queries per call: with 4 vectors of keys, 24 accumulators, and 8 registers for the rest.
QUERIES = 6
# Vectors of keys where few are left, and in blocks that are no multiple of `BLOCK` keys.
NARROW = 2
BLOCK = 128
LOWEST = -3.0e38
# Logits may lie this far above the running peak before sums are scaled anew: 2^64 of them, added
# up, are far from the end of float32, and no digit is lost.
HEADROOM = 64.0


def vectors(queries: int) -> int:
    """Vectors of keys that `fold` takes at a time where there are enough.

    Few queries leave registers for more keys, and reading long runs of keys is what they wait for.
    """
    return 8 if queries <= 3 else 4


@dataclass(frozen=True)
class _Arrays:
    """Element pointers of the arrays `fold` takes, and what queries and pages are made of."""

    query_type: Any
    page_type: Any
    q: Any
    keys: Any
    values: Any
    following: Any
    peak: Any
    total: Any
    sums: Any
    positions: Any
    first: Any
    slopes: Any
    bias: Any
    kind: Any
    marks: Any


@dataclass(frozen=True)
class _Numbers:
    """The scalars `fold` takes."""

    row: Any
    column: Any
    count: Any
    start: Any
    head_dim: Any
    block: Any
    scale: Any
    cap: Any


@intrinsic
def fold(typingctx, whole, wide, weigh, queries, arrays, numbers):
    """Fold some keys of a page into the running (peak, total, value sums) of some queries.

    Args, none of which is checked:
        whole: all these keys are visible to all these queries, and logits stay as they are.
        wide: `vectors(queries)` vectors of keys, else `NARROW`.
        weigh: sum the values too.
        queries: 1 to `QUERIES`.
        arrays: `q` float32 `[rows, head_dim]`, or uint32 `[rows, head_dim / 2]` of bfloat16 pairs;
            `keys` `[head_dim, block]` and `values` `[block, head_dim]`, or uint32 `[head_dim / 2,
            block]` and `[block / 2, head_dim]` of such pairs; `following` the keys that will be
            folded next; float32 `peak` and `total` `[rows, LANES]` and `sums` `[rows, head_dim]`;
            int64 `positions` and `first` `[rows]`, the last and first visible key; float32 `slopes`
            and `bias` `[rows]`, the latter added to logits where `marks` float32 `[kinds, block]`
            is 1 in the row that int64 `kind` `[rows]` names.
        numbers: `row` of the first query, `column` of the first key, `count` of the keys from there
            on whose values may be read, `start` the page's first position, `head_dim`, `block`;
            float32 `scale` and `cap`, as the slopes for base 2.

    `peak`, the same in all lanes, is at most `HEADROOM` below the largest logit. Lane `l` of
    `total` is the sum of `2^(x - peak)` over the keys of that lane, and `sums` that of
    `2^(x - peak) v` over all keys.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _fold(context, builder, signature, args)
        return context.get_dummy_value()

    return types.void(whole, wide, weigh, queries, arrays, numbers), codegen


def _fold(context: Any, builder: Any, signature: Any, args: Any) -> None:
    arrays, numbers = _unpack(context, builder, signature, args)
    whole, wide, weigh, count = args[:4]
    kind = I16 if arrays.query_type == types.uint32 else F32
    weights = cgutils.alloca_once(builder, kind, size=QUERIES * BLOCK)
    for queries in range(1, QUERIES + 1):
        with builder.if_then(builder.icmp_signed("==", count, I64(queries))):
            with builder.if_else(wide) as (then, otherwise):
                for branch, width in ((then, vectors(queries)), (otherwise, NARROW)):
                    with branch:
                        _softmax(builder, arrays, numbers, queries, width, whole, weigh, weights)
            with builder.if_then(weigh):
                most = builder.select(wide, I64(vectors(queries) * LANES), I64(NARROW * LANES))
                fewer = builder.icmp_signed("<", numbers.count, most)
                depth = builder.select(fewer, numbers.count, most)
                _sum_values(builder, arrays, numbers, queries, depth, weights)


def _unpack(context: Any, builder: Any, signature: Any, args: Any) -> tuple[_Arrays, _Numbers]:
    kinds = signature.args[4]
    pointers = [
        context.make_array(kind)(context, builder, builder.extract_value(args[4], i)).data
        for i, kind in enumerate(kinds)
    ]
    numbers = [builder.extract_value(args[5], i) for i in range(len(signature.args[5]))]
    return _Arrays(kinds[0].dtype, kinds[1].dtype, *pointers), _Numbers(*numbers)


def _softmax(
    builder: Any,
    arrays: _Arrays,
    numbers: _Numbers,
    queries: int,
    width: int,
    whole: Any,
    weigh: Any,
    weights: Any,
) -> None:
    rows = [builder.add(numbers.row, I64(i)) for i in range(queries)]
    logits = _logits(builder, arrays, numbers, rows, width, weigh)
    with builder.if_then(builder.not_(whole)):
        for row, found in zip(rows, logits, strict=True):
            _shape(builder, arrays, numbers, row, found)
    for i, (row, found) in enumerate(zip(rows, logits, strict=True)):
        _raise_peak(builder, arrays, numbers, row, found, weigh)
        _add_up(builder, arrays, row, found, weights, i * BLOCK)


def _logits(
    builder: Any, arrays: _Arrays, numbers: _Numbers, rows: list[Any], width: int, weigh: Any
) -> list[list[Any]]:
    """Where `scale * q[i] . keys[:, j]` is, by query and vector."""
    halves = I64(2 if arrays.query_type == types.uint32 else 1)
    length = builder.udiv(numbers.head_dim, halves)
    queries = Rows(arrays.query_type, arrays.q, [builder.mul(row, length) for row in rows])
    size = builder.mul(numbers.head_dim, numbers.block)
    following = builder.select(weigh, arrays.values, arrays.following)
    keys = Matrix(arrays.page_type, arrays.keys, numbers.block, following, size)
    sums = accumulators(builder, len(rows), width)
    multiply(builder, queries, keys, numbers.column, numbers.head_dim, sums)
    factor = splat(builder, numbers.scale)
    for accumulator in (a for row in sums for a in row):
        builder.store(builder.fmul(builder.load(accumulator), factor), accumulator)
    return sums


def _shape(builder: Any, arrays: _Arrays, numbers: _Numbers, row: Any, logits: list[Any]) -> None:
    """Soft cap, ALiBi, bias and visibility of one row; hidden keys get the lowest logit."""
    last = builder.load(builder.gep(arrays.positions, [row]))
    first = builder.load(builder.gep(arrays.first, [row]))
    slope = splat(builder, builder.load(builder.gep(arrays.slopes, [row])))
    bias = splat(builder, builder.load(builder.gep(arrays.bias, [row])))
    marks = builder.mul(builder.load(builder.gep(arrays.kind, [row])), numbers.block)
    zero = ir.Constant(VI32, [0] * LANES)
    for v, logit in enumerate(logits):
        base = builder.add(builder.add(numbers.start, numbers.column), I64(LANES * v))
        after_last = lanes_from(builder, builder.sub(base, last))
        after_first = lanes_from(builder, builder.sub(base, first))
        x = _capped(builder, builder.load(logit), numbers.cap)
        x = multiply_add(builder, slope, builder.sitofp(after_last, VF32), x)
        column = builder.add(builder.add(marks, numbers.column), I64(LANES * v))
        x = multiply_add(builder, bias, load(builder, arrays.marks, column, VF32), x)
        visible = builder.and_(
            builder.icmp_signed("<=", after_last, zero),
            builder.icmp_signed(">=", after_first, zero),
        )
        builder.store(builder.select(visible, x, each(LOWEST)), logit)


def _capped(builder: Any, x: Any, cap: Any) -> Any:
    """`cap * tanh(x / cap)` where there is a cap, through `tanh y = 1 - 2 / (e^2y + 1)`."""
    result = cgutils.alloca_once_value(builder, x)
    builder.store(x, result)
    with builder.if_then(builder.fcmp_ordered(">", cap, ir.Constant(F32, 0.0))):
        wide, one = splat(builder, cap), each(1.0)
        y = builder.fmul(builder.fdiv(x, wide), each(2.8853900817779268))  # 2 log2(e)
        most = each(30.0)
        raised = power(builder, builder.select(builder.fcmp_ordered(">", y, most), most, y))
        tanh = builder.fsub(one, builder.fdiv(each(2.0), builder.fadd(raised, one)))
        builder.store(builder.fmul(wide, tanh), result)
    return builder.load(result)


def _raise_peak(
    builder: Any, arrays: _Arrays, numbers: _Numbers, row: Any, logits: list[Any], weigh: Any
) -> None:
    """Raise a row's peak where a logit lies far above it, and scale its sums; that is rare."""
    place = builder.mul(row, I64(LANES))
    peak_at, total_at = (at(builder, data, place, VF32) for data in (arrays.peak, arrays.total))
    before = builder.load(peak_at, align=4)
    highest = builder.load(logits[0])
    for logit in logits[1:]:
        highest = larger(builder, builder.load(logit), highest)
    beyond = builder.fcmp_ordered(">", highest, builder.fadd(before, each(HEADROOM)))
    any_beyond = builder.icmp_signed("!=", builder.bitcast(beyond, I16), I16(0))
    with builder.if_then(any_beyond, likely=False):
        peak = larger(builder, across(builder, highest, larger), before)
        scale = power(builder, builder.fsub(before, peak))
        builder.store(builder.fmul(builder.load(total_at, align=4), scale), total_at, align=4)
        builder.store(peak, peak_at, align=4)
        with builder.if_then(weigh):
            start = builder.mul(row, numbers.head_dim)
            with cgutils.for_range(builder, builder.udiv(numbers.head_dim, I64(LANES))) as loop:
                channel = builder.add(start, builder.mul(loop.index, I64(LANES)))
                sums = at(builder, arrays.sums, channel, VF32)
                builder.store(builder.fmul(builder.load(sums, align=4), scale), sums, align=4)


def _add_up(
    builder: Any, arrays: _Arrays, row: Any, logits: list[Any], weights: Any, start: int
) -> None:
    """Exponentials of a row into its total, and in the queries' type into `weights`."""
    place = builder.mul(row, I64(LANES))
    peak, total_at = load(builder, arrays.peak, place, VF32), at(builder, arrays.total, place, VF32)
    total = builder.load(total_at, align=4)
    for v, logit in enumerate(logits):
        weight = power(builder, builder.fsub(builder.load(logit), peak))
        total = builder.fadd(total, weight, flags=CONTRACT)
        index = I64(start + LANES * v)
        if arrays.query_type == types.uint32:
            rounded = round_to_half(builder, weight)
            builder.store(rounded, at(builder, weights, index, VI16), align=2)
        else:
            builder.store(weight, at(builder, weights, index, VF32), align=4)
    builder.store(total, total_at, align=4)


def _sum_values(
    builder: Any, arrays: _Arrays, numbers: _Numbers, queries: int, depth: Any, weights: Any
) -> None:
    """Add `depth` values, weighted, to the sums of each query; whole vectors of channels."""
    pairs = arrays.query_type == types.uint32
    per_element = 2 if pairs else 1
    pointer = builder.bitcast(weights, (ir.IntType(32) if pairs else F32).as_pointer())
    starts = [I64(i * BLOCK // per_element) for i in range(queries)]
    rows = Rows(arrays.query_type, pointer, starts)
    size = builder.mul(numbers.head_dim, numbers.block)
    first = builder.mul(numbers.column, numbers.head_dim)
    if arrays.page_type == types.uint32:
        first = builder.udiv(first, I64(2))
    data = builder.gep(arrays.values, [first])
    left = builder.sub(size, first)
    values = Matrix(arrays.page_type, data, numbers.head_dim, arrays.following, left)
    sums = [builder.mul(builder.add(numbers.row, I64(i)), numbers.head_dim) for i in range(queries)]
    add_products(builder, rows, values, depth, arrays.sums, sums)


@intrinsic
def settle(typingctx, peak, total, row):
    """Peak and sum over lanes of what `fold` left of a row: `2^peak * sum` in all.

    A NaN that the peak loses is in the sum.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = builder.mul(args[2], I64(LANES))
        peaks, totals = (
            load(builder, context.make_array(kind)(context, builder, array).data, place, VF32)
            for kind, array in zip(signature.args[:2], args[:2], strict=True)
        )
        whole = across(builder, totals, lambda builder, x, y: builder.fadd(x, y))
        both = [builder.extract_element(found, ir.IntType(32)(0)) for found in (peaks, whole)]
        return context.make_tuple(builder, signature.return_type, both)

    return types.UniTuple(types.float32, 2)(peak, total, types.intp), codegen
