"""Products of queries with a page's first keys, and of weights with their values, in float32.

`fold` does both at once and keeps no logit; where keys are told apart by them, that will not do.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from server.kernels.cpu_llvm import I64, LANES, VF32, across, at, each, larger, load
from server.kernels.cpu_product import (
    AHEAD,
    CACHE_LINE,
    Matrix,
    Rows,
    accumulators,
    add_products,
    ask,
    multiply,
)
from server.kernels.cpu_vector import LOWEST, QUERIES, vectors

# Pages are multiples of so many keys.
STEP = 2 * LANES
# Rows of weights per call.
MOST = 4


def _scorer(most: int) -> Any:
    """Every number of queries is compiled by itself."""

    @intrinsic
    def score(typingctx, queries, first, rows, keys, following, count, out):
        """`queries[first : first + rows] @ keys[:, :count]` into the first rows of `out`.

        Of what is written behind the last key, in `out`, no matter.

        Args, none of which is checked:
            queries: float32 `[n, head_dim]`, or uint32 `[n, head_dim / 2]` of bfloat16 pairs.
            first: of the queries.
            rows: how many, 1 to `most`.
            keys: `[head_dim, block]` as in the cache, or uint32 `[head_dim / 2, block]` of pairs.
            following: what will be read next, of that shape.
            count: 1 to `block`.
            out: float32 `[most, block]`, or `[block]` for one.
        """

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            given, _, _, page, following, _, found = _pointers(context, builder, signature, args)
            length = _shape(context, builder, signature.args[0], args[0])[1]
            kind = signature.args[0].dtype
            head_dim = builder.mul(length, I64(2 if kind == types.uint32 else 1))
            depth, block = _shape(context, builder, signature.args[3], args[3])
            size = builder.mul(depth, block)
            matrix = Matrix(signature.args[3].dtype, page, block, following, size)
            for number in range(1, most + 1):
                with builder.if_then(builder.icmp_signed("==", args[2], I64(number))):
                    starts = [
                        builder.mul(builder.add(args[1], I64(r)), length) for r in range(number)
                    ]
                    _score(builder, Rows(kind, given, starts), matrix, head_dim, args[5], found)
            return context.get_dummy_value()

        kinds = queries, types.intp, types.intp, keys, following, types.intp, out
        return types.void(*kinds), codegen

    return score


def _score(builder: Any, rows: Rows, keys: Matrix, depth: Any, count: Any, found: Any) -> None:
    """Many keys at a time, and what is left in steps."""
    width = vectors(len(rows.starts))
    wide = I64(width * LANES)
    fits = builder.icmp_signed("==", builder.urem(keys.columns, wide), I64(0))
    most = builder.sdiv(builder.add(count, I64(width * LANES - STEP - 1)), wide)
    steps = builder.select(fits, most, I64(0))
    with cgutils.for_range(builder, steps) as loop:
        _score_some(builder, rows, keys, depth, builder.mul(loop.index, wide), width, found)
    column = builder.mul(steps, wide)
    left = builder.sub(builder.add(count, I64(STEP - 1)), column)
    with cgutils.for_range(builder, builder.sdiv(left, I64(STEP))) as loop:
        place = builder.add(column, builder.mul(loop.index, I64(STEP)))
        _score_some(builder, rows, keys, depth, place, STEP // LANES, found)


def _score_some(
    builder: Any, rows: Rows, keys: Matrix, depth: Any, column: Any, width: int, found: Any
) -> None:
    sums = accumulators(builder, len(rows.starts), width)
    multiply(builder, rows, keys, column, depth, sums)
    for r, row in enumerate(sums):
        place = builder.add(builder.mul(I64(r), keys.columns), column)
        for v, accumulator in enumerate(row):
            pointer = at(builder, found, builder.add(place, I64(LANES * v)), VF32)
            builder.store(builder.load(accumulator), pointer, align=4)


score_one, score_many = _scorer(1), _scorer(QUERIES)


@intrinsic
def add_values(typingctx, weights, values, following, first, rows, count, sums):
    """`sums[r] += weights[r, :count] @ values[:count]` for `first <= r < first + rows`.

    Args, none of which is checked:
        weights: float32 `[n, block]`.
        values: `[block, head_dim]`, as in the cache.
        following: what will be read next, of that shape.
        first: of the rows.
        rows: how many, 1 to `MOST`.
        count: 1 to `block`.
        sums: float32 `[n, head_dim]`.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        given, page, following, _, _, _, found = _pointers(context, builder, signature, args)
        block, head_dim = _shape(context, builder, signature.args[1], args[1])
        size = builder.mul(head_dim, block)
        matrix = Matrix(signature.args[1].dtype, page, head_dim, following, size)
        for number in range(1, MOST + 1):
            with builder.if_then(builder.icmp_signed("==", args[4], I64(number))):
                chosen = [builder.add(args[3], I64(r)) for r in range(number)]
                left = Rows(types.float32, given, [builder.mul(row, block) for row in chosen])
                starts = [builder.mul(row, head_dim) for row in chosen]
                add_products(builder, left, matrix, args[5], found, starts)
        return context.get_dummy_value()

    kinds = weights, values, following, types.intp, types.intp, types.intp, sums
    return types.void(*kinds), codegen


@intrinsic
def ask_for(typingctx, page):
    """Have the first `AHEAD` bytes of a page brought near; the products ask for the others."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = _pointers(context, builder, signature, args)[0]
        line = I64(CACHE_LINE * 8 // page.dtype.bitwidth)
        with cgutils.for_range(builder, I64(AHEAD // CACHE_LINE)) as loop:
            ask(builder, builder.gep(data, [builder.mul(loop.index, line)]))
        return context.get_dummy_value()

    return types.void(page), codegen


@intrinsic
def highest(typingctx, x, count):
    """The largest of `x[:count]` but for NaN, at least `LOWEST`; whole vectors are read.

    Compilers make vectors of it only where they may take it that no NaN comes.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = _pointers(context, builder, signature, args)[0]
        top = cgutils.alloca_once_value(builder, each(LOWEST))
        builder.store(each(LOWEST), top)
        steps = builder.udiv(builder.add(args[1], I64(LANES - 1)), I64(LANES))
        with cgutils.for_range(builder, steps) as loop:
            found = load(builder, data, builder.mul(loop.index, I64(LANES)), VF32)
            builder.store(larger(builder, found, builder.load(top)), top)
        whole = across(builder, builder.load(top), larger)
        return builder.extract_element(whole, ir.IntType(32)(0))

    return types.float32(x, types.intp), codegen


def _pointers(context: Any, builder: Any, signature: Any, args: Any) -> list[Any]:
    """To the elements of arrays; None for numbers."""
    return [
        context.make_array(kind)(context, builder, arg).data
        if isinstance(kind, types.Array)
        else None
        for kind, arg in zip(signature.args, args, strict=True)
    ]


def _shape(context: Any, builder: Any, kind: Any, array: Any) -> tuple[ir.Value, ir.Value]:
    rows, columns = cgutils.unpack_tuple(
        builder, context.make_array(kind)(context, builder, array).shape
    )
    return rows, columns
