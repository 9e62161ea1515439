"""Log-sum-exp over pages of keys, written as LLVM vectors of 16 lanes.

What `fold` computes stays in registers from the dot products to the exponentials; compilers keep
neither the accumulators of a loop over keys nor a softmax in them. LLVM maps 16 lanes to what the
machine has. Logits are in base 2 throughout: `2^x` is cheaper than `e^x`.

numba's cache on disk knows only the file of the function it compiled: after a change here, touch
`cpu_lse.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
# Queries per call: with 4 vectors of keys, 24 accumulators, and 8 registers for the rest.
QUERIES = 6
# Vectors of keys where few are left, and in blocks that are no multiple of `BLOCK` keys.
NARROW = 2
BLOCK = 128
# Channels of 128 keys in 16 bits that take 4 KiB.
AHEAD = 16
CACHE_LINE = 64
# The host multiplies pairs of bfloat16 into float32.
PAIRS = bool(llvm.get_host_cpu_features().get("avx512bf16"))
LOWEST = -3.0e38
# Logits may lie this far above the running peak before sums are scaled anew: 2^64 of them, added
# up, are far from the end of float32, and no digit is lost.
HEADROOM = 64.0

_F32, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_VF32, _VI32 = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
_VI16, _VF16 = ir.VectorType(_I16, LANES), ir.VectorType(ir.HalfType(), LANES)
_CONTRACT = ("contract",)
# 2^f for |f| <= 1/2, relative error below 1e-7: a Lawson fit with the constant held at 1.
_POWER = (1.3276471e-3, 9.6755414e-3, 5.5507133e-2, 2.4022120e-1, 6.9314697e-1, 1.0)


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
    page: Any
    following: Any
    peak: Any
    total: Any
    positions: Any
    first: Any
    slopes: Any


@dataclass(frozen=True)
class _Numbers:
    """The scalars `fold` takes."""

    row: Any
    column: Any
    start: Any
    head_dim: Any
    block: Any
    scale: Any
    cap: Any


@intrinsic
def fold(typingctx, whole, wide, queries, arrays, numbers):
    """Fold some keys of a page into the running (peak, total) of some queries.

    Args, none of which is checked:
        whole: all these keys are visible to all these queries, and logits are not reshaped.
        wide: `vectors(queries)` vectors of keys, else `NARROW`.
        queries: 1 to `QUERIES`.
        arrays: `q` float32 `[rows, head_dim]`, or uint32 `[rows, head_dim / 2]` of bfloat16 pairs;
            `page` `[head_dim, block]`, or uint32 `[head_dim / 2, block]` of such pairs;
            `following` the page that will be folded next;
            `peak` and `total` float32 `[rows, LANES]`; int64 `positions` and `first` `[rows]`, the
            last and first visible key; float32 `slopes` `[rows]`.
        numbers: `row` of the first query, `column` of the first key, `start` the page's first
            position, `head_dim`, `block`; float32 `scale` and `cap`, as the slopes for base 2.

    Lane `l` of `total` is the sum of `2^(x - peak)` over the keys of that lane, and `peak` at most
    `HEADROOM` below the largest of them.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _emit_fold(context, builder, signature, args)
        return context.get_dummy_value()

    return types.void(whole, wide, queries, arrays, numbers), codegen


def _emit_fold(context: Any, builder: Any, signature: Any, args: Any) -> None:
    arrays, numbers = _unpack(context, builder, signature, args)
    whole, wide, count = args[:3]
    for queries in range(1, QUERIES + 1):
        with builder.if_then(builder.icmp_signed("==", count, _I64(queries))):
            with builder.if_else(wide) as (then, otherwise):
                for branch, width in ((then, vectors(queries)), (otherwise, NARROW)):
                    with branch:
                        _emit_case(builder, arrays, numbers, queries, width, whole)


def _unpack(context: Any, builder: Any, signature: Any, args: Any) -> tuple[_Arrays, _Numbers]:
    kinds = signature.args[3]
    pointers = [
        context.make_array(kind)(context, builder, builder.extract_value(args[3], i)).data
        for i, kind in enumerate(kinds)
    ]
    numbers = [builder.extract_value(args[4], i) for i in range(len(signature.args[4]))]
    return _Arrays(kinds[0].dtype, kinds[1].dtype, *pointers), _Numbers(*numbers)


def _emit_case(
    builder: Any, arrays: _Arrays, numbers: _Numbers, queries: int, width: int, whole: Any
) -> None:
    logits = _emit_logits(builder, arrays, numbers, queries, width)
    with builder.if_then(builder.not_(whole)):
        for i, row in enumerate(logits):
            _emit_shape(builder, arrays, numbers, builder.add(numbers.row, _I64(i)), row)
    for i, row in enumerate(logits):
        _emit_softmax(builder, arrays, builder.add(numbers.row, _I64(i)), row)


def _emit_logits(
    builder: Any, arrays: _Arrays, numbers: _Numbers, queries: int, width: int
) -> list[list[Any]]:
    """Where `scale * q[i] . page[:, j]` is, by query and vector."""
    pairs = arrays.query_type == types.uint32
    depth = builder.udiv(numbers.head_dim, _I64(2)) if pairs else numbers.head_dim
    rows = [builder.mul(builder.add(numbers.row, _I64(i)), depth) for i in range(queries)]
    zero = ir.Constant(_VF32, [0.0] * LANES)
    sums = [[cgutils.alloca_once(builder, _VF32) for _ in range(width)] for _ in rows]
    for accumulator in (a for each in sums for a in each):
        builder.store(zero, accumulator)
    load = _load_pairs if pairs else _load_keys
    with cgutils.for_range(builder, depth) as loop:
        _prefetch(builder, arrays, numbers, loop.index, vectors(queries))
        keys = load(builder, arrays, numbers, loop.index, width)
        for row, accumulators in zip(rows, sums, strict=True):
            query = builder.load(builder.gep(arrays.q, [builder.add(row, loop.index)]))
            for key, accumulator in zip(keys, accumulators, strict=True):
                product = (_dot_pairs if pairs else _dot)(
                    builder, builder.load(accumulator), key, _splat(builder, query)
                )
                builder.store(product, accumulator)
    factor = _splat(builder, numbers.scale)
    for accumulator in (a for each in sums for a in each):
        builder.store(builder.fmul(builder.load(accumulator), factor), accumulator)
    return sums


def _load_keys(
    builder: Any, arrays: _Arrays, numbers: _Numbers, depth: Any, width: int
) -> list[Any]:
    """One channel of `width` vectors of keys, as float32.

    Pages hold floats as they are, else bit patterns: uint16 is bfloat16, int16 is float16; numpy
    and numba know neither as a number.
    """
    start = builder.add(builder.mul(depth, numbers.block), numbers.column)
    return [
        _load_float(builder, arrays.page_type, arrays.page, builder.add(start, _I64(LANES * v)))
        for v in range(width)
    ]


def _load_float(builder: Any, dtype: Any, data: Any, index: Any) -> Any:
    pointer = builder.gep(data, [index])
    if dtype == types.float32:
        return builder.load(builder.bitcast(pointer, _VF32.as_pointer()), align=4)
    bits = builder.load(builder.bitcast(pointer, _VI16.as_pointer()), align=2)
    if dtype == types.uint16:
        wide = builder.shl(builder.zext(bits, _VI32), ir.Constant(_VI32, [16] * LANES))
        return builder.bitcast(wide, _VF32)
    return builder.fpext(builder.bitcast(bits, _VF16), _VF32)


def _load_pairs(
    builder: Any, arrays: _Arrays, numbers: _Numbers, depth: Any, width: int
) -> list[Any]:
    """Two channels of `width` vectors of keys, the pair of each key in one 32-bit lane."""
    if arrays.page_type == types.uint32:
        start = builder.add(builder.mul(depth, numbers.block), numbers.column)
        return [
            _load(builder, arrays.page, builder.add(start, _I64(LANES * v)), _VI32, 4)
            for v in range(width)
        ]
    both = ir.VectorType(_I16, 2 * LANES)
    even = builder.mul(builder.mul(depth, _I64(2)), numbers.block)
    found = []
    for v in range(0, width, 2):
        at = builder.add(numbers.column, _I64(LANES * v))
        low = _load(builder, arrays.page, builder.add(even, at), both, 2)
        odd = builder.add(builder.add(even, numbers.block), at)
        high = _load(builder, arrays.page, odd, both, 2)
        for half in range(2):
            lanes = range(half * LANES, (half + 1) * LANES)
            mask = [index for lane in lanes for index in (lane, lane + 2 * LANES)]
            mixed = builder.shuffle_vector(
                low, high, ir.Constant(ir.VectorType(_I32, 2 * LANES), mask)
            )
            found.append(builder.bitcast(mixed, _VI32))
    return found


def _prefetch(builder: Any, arrays: _Arrays, numbers: _Numbers, depth: Any, width: int) -> None:
    """Ask for the keys `AHEAD` channels on, at the end of the page for those of the next.

    Hardware does so within 4 KiB only. Unpacked pages lie in the nearest cache anyway.
    """
    if arrays.page_type == types.uint32:
        return
    rows = 2 if arrays.query_type == types.uint32 else 1
    size = arrays.page_type.bitwidth // 8
    channel = builder.add(builder.mul(depth, _I64(rows)), _I64(AHEAD))
    beyond = builder.icmp_signed(">=", channel, numbers.head_dim)
    page = builder.select(beyond, arrays.following, arrays.page)
    channel = builder.select(beyond, builder.sub(channel, numbers.head_dim), channel)
    start = builder.add(builder.mul(channel, numbers.block), numbers.column)
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
    call = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    for row in range(rows):
        first = builder.add(start, builder.mul(_I64(row), numbers.block))
        for line in range(0, width * LANES, CACHE_LINE // size):
            pointer = builder.gep(page, [builder.add(first, _I64(line))])
            builder.call(call, [builder.bitcast(pointer, byte), _I32(0), _I32(3), _I32(1)])


def _load(builder: Any, data: Any, index: Any, kind: Any, align: int) -> Any:
    pointer = builder.bitcast(builder.gep(data, [index]), kind.as_pointer())
    return builder.load(pointer, align=align)


def _dot(builder: Any, total: Any, keys: Any, query: Any) -> Any:
    product = builder.fmul(keys, query, flags=_CONTRACT)
    return builder.fadd(product, total, flags=_CONTRACT)


def _dot_pairs(builder: Any, total: Any, keys: Any, query: Any) -> Any:
    """Products are exact in float32, sums rounded to it."""
    return _call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", [total, keys, query])


def _call(builder: Any, name: str, args: list[Any]) -> Any:
    """A function of LLVM's that returns a vector of float32."""
    kind = ir.FunctionType(_VF32, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def _emit_shape(
    builder: Any, arrays: _Arrays, numbers: _Numbers, row: Any, logits: list[Any]
) -> None:
    """Soft cap, ALiBi and visibility of one row; hidden keys get the lowest logit."""
    last = builder.load(builder.gep(arrays.positions, [row]))
    first = builder.load(builder.gep(arrays.first, [row]))
    slope = _splat(builder, builder.load(builder.gep(arrays.slopes, [row])))
    zero = ir.Constant(_VI32, [0] * LANES)
    for v, logit in enumerate(logits):
        base = builder.add(builder.add(numbers.start, numbers.column), _I64(LANES * v))
        after_last = _lanes_from(builder, builder.sub(base, last))
        after_first = _lanes_from(builder, builder.sub(base, first))
        x = _capped(builder, builder.load(logit), numbers.cap)
        distance = builder.sitofp(after_last, _VF32)
        x = builder.fadd(x, builder.fmul(slope, distance, flags=_CONTRACT), flags=_CONTRACT)
        visible = builder.and_(
            builder.icmp_signed("<=", after_last, zero),
            builder.icmp_signed(">=", after_first, zero),
        )
        builder.store(builder.select(visible, x, ir.Constant(_VF32, [LOWEST] * LANES)), logit)


def _capped(builder: Any, x: Any, cap: Any) -> Any:
    """`cap * tanh(x / cap)` where there is a cap, through `tanh y = 1 - 2 / (e^2y + 1)`."""
    result = cgutils.alloca_once_value(builder, x)
    builder.store(x, result)
    with builder.if_then(builder.fcmp_ordered(">", cap, ir.Constant(_F32, 0.0))):
        wide = _splat(builder, cap)
        double = ir.Constant(_VF32, [2.8853900817779268] * LANES)  # 2 log2(e)
        most = ir.Constant(_VF32, [30.0] * LANES)
        y = builder.fmul(builder.fdiv(x, wide), double)
        power = _emit_power(builder, builder.select(builder.fcmp_ordered(">", y, most), most, y))
        one = ir.Constant(_VF32, [1.0] * LANES)
        two = ir.Constant(_VF32, [2.0] * LANES)
        tanh = builder.fsub(one, builder.fdiv(two, builder.fadd(power, one)))
        builder.store(builder.fmul(wide, tanh), result)
    return builder.load(result)


def _emit_softmax(builder: Any, arrays: _Arrays, row: Any, logits: list[Any]) -> None:
    at = builder.mul(row, _I64(LANES))
    peak_at, total_at = (
        builder.bitcast(builder.gep(data, [at]), _VF32.as_pointer())
        for data in (arrays.peak, arrays.total)
    )
    before, found = builder.load(peak_at, align=4), [builder.load(logit) for logit in logits]
    highest = found[0]
    for x in found[1:]:
        highest = _larger(builder, x, highest)
    headroom = builder.fadd(before, ir.Constant(_VF32, [HEADROOM] * LANES))
    beyond = builder.fcmp_ordered(">", highest, headroom)
    any_beyond = builder.icmp_signed("!=", builder.bitcast(beyond, _I16), _I16(0))
    with builder.if_then(any_beyond, likely=False):
        peak = _larger(builder, highest, before)
        scaled = _emit_power(builder, builder.fsub(before, peak))
        builder.store(builder.fmul(builder.load(total_at, align=4), scaled), total_at, align=4)
        builder.store(peak, peak_at, align=4)
    peak, total = builder.load(peak_at, align=4), builder.load(total_at, align=4)
    for x in found:
        total = builder.fadd(total, _emit_power(builder, builder.fsub(x, peak)))
    builder.store(total, total_at, align=4)


def _larger(builder: Any, x: Any, y: Any) -> Any:
    """The larger of both by lane; `y` where `x` is NaN."""
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


def _emit_power(builder: Any, x: Any) -> Any:
    """`2^x`, NaN for NaN; below 2^-125 for x < -126; x must be below 126."""

    def each(value: float) -> Any:
        return ir.Constant(_VF32, [value] * LANES)

    low = each(-126.0)
    y = builder.select(builder.fcmp_ordered("<", x, low), low, x)
    whole = _call(builder, "llvm.rint.v16f32", [y])
    f = builder.fsub(y, whole)
    power = each(_POWER[0])
    for coefficient in _POWER[1:]:
        product = builder.fmul(power, f, flags=_CONTRACT)
        power = builder.fadd(product, each(coefficient), flags=_CONTRACT)
    bits = ir.Constant(_VI32, [23] * LANES)
    exponent = builder.shl(builder.fptosi(whole, _VI32), bits)
    return builder.bitcast(builder.add(builder.bitcast(power, _VI32), exponent), _VF32)


def _lanes_from(builder: Any, base: Any) -> Any:
    """`base + lane` by lane, int32."""
    lanes = ir.Constant(_VI32, list(range(LANES)))
    return builder.add(_splat(builder, builder.trunc(base, _I32)), lanes)


def _splat(builder: Any, value: Any) -> Any:
    kind = ir.VectorType(value.type, LANES)
    nothing = ir.Constant(kind, ir.Undefined)
    single = builder.insert_element(nothing, value, _I32(0))
    return builder.shuffle_vector(single, nothing, ir.Constant(_VI32, [0] * LANES))


@intrinsic
def settle(typingctx, peak, total, row):
    """Peak and sum over lanes of what `fold` left of a row: `2^peak * sum` in all.

    A NaN that the peak loses is in the sum.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = builder.mul(args[2], _I64(LANES))
        peaks, totals = (
            _load(builder, context.make_array(kind)(context, builder, array).data, at, _VF32, 4)
            for kind, array in zip(signature.args[:2], args[:2], strict=True)
        )
        top = _across(builder, peaks, _larger)
        scaled = builder.fmul(totals, _emit_power(builder, builder.fsub(peaks, top)))
        whole = _across(builder, scaled, lambda builder, x, y: builder.fadd(x, y))
        both = [builder.extract_element(each, _I32(0)) for each in (top, whole)]
        return context.make_tuple(builder, signature.return_type, both)

    return types.UniTuple(types.float32, 2)(peak, total, types.intp), codegen


def _across(builder: Any, x: Any, merge: Callable[[Any, Any, Any], Any]) -> Any:
    """All lanes merged, in every lane."""
    for distance in (8, 4, 2, 1):
        mask = ir.Constant(_VI32, [lane ^ distance for lane in range(LANES)])
        x = merge(builder, x, builder.shuffle_vector(x, x, mask))
    return x
