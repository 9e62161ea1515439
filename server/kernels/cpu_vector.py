"""Vector instructions for the CPU loops, written as LLVM vectors of 16 lanes.

Compilers keep the accumulators of `sum_d q[d] k[d, j]` in memory when the loop over `j` is
inside; here they are registers. LLVM maps 16 lanes to what the machine has. Measured on one
core of a Zen 5 it is bound by memory, not by arithmetic (docs/benchmarks.md).

numba's cache on disk knows only the file of the function it compiled: after a change here, touch
`cpu_loops.py`.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
# Two vectors of keys and six queries fill the registers: 12 accumulators, 2 keys, 1 query.
VECTORS = 2
KEYS = LANES * VECTORS
QUERIES = 6

_F32, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_VF32, _VI32 = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
_VI16, _VF16 = ir.VectorType(_I16, LANES), ir.VectorType(ir.HalfType(), LANES)
_CONTRACT = ("contract",)


def _load_keys(builder: Any, dtype: Any, data: Any, index: Any) -> Any:
    """16 elements of a page as float32: floats as they are, else bit patterns.

    uint16 holds bfloat16, int16 holds float16; numpy and numba know neither as a number.
    """
    pointer = builder.gep(data, [index])
    if dtype == types.float32:
        return builder.load(builder.bitcast(pointer, _VF32.as_pointer()), align=4)
    bits = builder.load(builder.bitcast(pointer, _VI16.as_pointer()), align=2)
    if dtype == types.uint16:
        wide = builder.shl(builder.zext(bits, _VI32), ir.Constant(_VI32, [16] * LANES))
        return builder.bitcast(wide, _VF32)
    return builder.fpext(builder.bitcast(bits, _VF16), _VF32)


def _splat(builder: Any, value: Any) -> Any:
    nothing = ir.Constant(_VF32, ir.Undefined)
    single = builder.insert_element(nothing, value, _I32(0))
    return builder.shuffle_vector(single, nothing, ir.Constant(_VI32, [0] * LANES))


def _pointer(context: Any, builder: Any, array_type: Any, array: Any) -> Any:
    return context.make_array(array_type)(context, builder, array).data


def make_dot(queries: int) -> Any:
    """`out[i, j] = sum_d q[i, d] page[d, j]` for `queries` rows and `KEYS` columns.

    The result takes `(q, page, out, i, j, head_dim, block)`: contiguous arrays float32
    `[rows, head_dim]`, `[head_dim, block]` of any key type, float32 `[rows, block]`, the first
    row and column, and the two widths. Nothing is checked.
    """

    @intrinsic
    def dot(typingctx, q, page, out, row, column, head_dim, block):  # noqa: ARG001 - numba's protocol
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _emit_dot(queries, context, builder, signature, args)
            return context.get_dummy_value()

        whole = types.intp
        return types.void(q, page, out, whole, whole, whole, whole), codegen

    return dot


def _emit_dot(queries: int, context: Any, builder: Any, signature: Any, args: Any) -> None:
    q, page, out = (
        _pointer(context, builder, kind, array)
        for kind, array in zip(signature.args[:3], args[:3], strict=True)
    )
    row, column, head_dim, block = args[3:]
    zero = ir.Constant(_VF32, [0.0] * LANES)
    sums = [
        [cgutils.alloca_once_value(builder, zero) for _ in range(VECTORS)] for _ in range(queries)
    ]
    for accumulator in (a for each in sums for a in each):
        builder.store(zero, accumulator)
    rows = [builder.add(row, _I64(i)) for i in range(queries)]
    with cgutils.for_range(builder, head_dim) as loop:
        start = builder.add(builder.mul(loop.index, block), column)
        keys = [
            _load_keys(builder, signature.args[1].dtype, page, builder.add(start, _I64(LANES * v)))
            for v in range(VECTORS)
        ]
        for i in range(queries):
            at = builder.add(builder.mul(rows[i], head_dim), loop.index)
            factor = _splat(builder, builder.load(builder.gep(q, [at])))
            for v in range(VECTORS):
                product = builder.fmul(keys[v], factor, flags=_CONTRACT)
                total = builder.fadd(product, builder.load(sums[i][v]), flags=_CONTRACT)
                builder.store(total, sums[i][v])
    for i in range(queries):
        for v in range(VECTORS):
            at = builder.add(builder.mul(rows[i], block), builder.add(column, _I64(LANES * v)))
            target = builder.bitcast(builder.gep(out, [at]), _VF32.as_pointer())
            builder.store(builder.load(sums[i][v]), target, align=4)


@intrinsic
def half_to_float(typingctx, bits):  # noqa: ARG001 - numba's protocol
    """float16 from its int16 bit pattern, as float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), _F32)

    return types.float32(types.int16), codegen


@intrinsic
def float_to_half(typingctx, value):  # noqa: ARG001 - numba's protocol
    """float32 rounded to float16, as an int16 bit pattern."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), _I16)

    return types.int16(types.float32), codegen
