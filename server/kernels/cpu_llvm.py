"""Vectors of 16 lanes in LLVM, which maps them to what the machine has.

Everything here emits instructions into a `builder` while numba compiles; nothing runs.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

LANES = 16

F32, I16, I32, I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
VF32, VI32 = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
VI16, VF16 = ir.VectorType(I16, LANES), ir.VectorType(ir.HalfType(), LANES)
CONTRACT = ("contract",)
# 2^f for |f| <= 1/2, relative error below 1e-7: a Lawson fit with the constant held at 1.
_POWER = (1.3276471e-3, 9.6755414e-3, 5.5507133e-2, 2.4022120e-1, 6.9314697e-1, 1.0)


def each(value: float) -> Any:
    """A number in every lane."""
    return ir.Constant(VF32, [value] * LANES)


def splat(builder: Any, value: Any) -> Any:
    """A value in every lane."""
    kind = ir.VectorType(value.type, LANES)
    nothing = ir.Constant(kind, ir.Undefined)
    single = builder.insert_element(nothing, value, I32(0))
    return builder.shuffle_vector(single, nothing, ir.Constant(VI32, [0] * LANES))


def lanes_from(builder: Any, base: Any) -> Any:
    """`base + lane` by lane, int32."""
    lanes = ir.Constant(VI32, list(range(LANES)))
    return builder.add(splat(builder, builder.trunc(base, I32)), lanes)


def at(builder: Any, data: Any, index: Any, kind: Any) -> Any:
    """Pointer to a `kind` that begins at an element."""
    return builder.bitcast(builder.gep(data, [index]), kind.as_pointer())


def load(builder: Any, data: Any, index: Any, kind: Any) -> Any:
    """A `kind` that begins at an element, wherever in memory that is."""
    return builder.load(at(builder, data, index, kind), align=2)


def load_float(builder: Any, dtype: Any, data: Any, index: Any) -> Any:
    """Successive elements as float32.

    Pages hold floats as they are, else bit patterns: uint16 is bfloat16, int16 is float16; numpy
    and numba know neither as a number.
    """
    if dtype == types.float32:
        return load(builder, data, index, VF32)
    bits = load(builder, data, index, VI16)
    if dtype == types.uint16:
        wide = builder.shl(builder.zext(bits, VI32), ir.Constant(VI32, [16] * LANES))
        return builder.bitcast(wide, VF32)
    return builder.fpext(builder.bitcast(bits, VF16), VF32)


def round_to_half(builder: Any, x: Any) -> Any:
    """The bit patterns of the nearest bfloat16, of two the larger; NaN stays NaN."""
    half = ir.Constant(VI32, [0x8000] * LANES)
    bits = builder.add(builder.bitcast(x, VI32), half)
    return builder.trunc(builder.lshr(bits, ir.Constant(VI32, [16] * LANES)), VI16)


def multiply_add(builder: Any, x: Any, y: Any, total: Any) -> Any:
    """`x * y + total`, rounded once where the machine does so."""
    return builder.fadd(builder.fmul(x, y, flags=CONTRACT), total, flags=CONTRACT)


def multiply_add_pairs(builder: Any, x: Any, y: Any, total: Any) -> Any:
    """The same of pairs of bfloat16: products are exact in float32, sums rounded to it."""
    return call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", [total, x, y])


def call(builder: Any, name: str, args: list[Any]) -> Any:
    """A function of LLVM's that returns a vector of float32."""
    kind = ir.FunctionType(VF32, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def larger(builder: Any, x: Any, y: Any) -> Any:
    """The larger of both by lane; `y` where `x` is NaN."""
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


def power(builder: Any, x: Any) -> Any:
    """`2^x`, NaN for NaN, 0 for x < -126; x must be below 126.

    What is hidden has a logit far below that. Anything but 0, times a value, would be a denormal
    number, and those take a hundred times as long to add.
    """
    low = each(-126.0)
    below = builder.fcmp_ordered("<", x, low)
    y = builder.select(below, low, x)
    whole = call(builder, "llvm.rint.v16f32", [y])
    f = builder.fsub(y, whole)
    result = each(_POWER[0])
    for coefficient in _POWER[1:]:
        result = multiply_add(builder, result, f, each(coefficient))
    bits = ir.Constant(VI32, [23] * LANES)
    exponent = builder.shl(builder.fptosi(whole, VI32), bits)
    found = builder.bitcast(builder.add(builder.bitcast(result, VI32), exponent), VF32)
    return builder.select(below, each(0.0), found)


def across(builder: Any, x: Any, merge: Callable[[Any, Any, Any], Any]) -> Any:
    """All lanes merged, in every lane."""
    for distance in (8, 4, 2, 1):
        mask = ir.Constant(VI32, [lane ^ distance for lane in range(LANES)])
        x = merge(builder, x, builder.shuffle_vector(x, x, mask))
    return x
