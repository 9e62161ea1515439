"""Products of queries with a page's first keys, and of weights with their values, in float32.

`fold` does both at once and keeps no logit; where keys are told apart by them, that will not do.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from server.kernels.cpu_llvm import I64, LANES, VF32, at
from server.kernels.cpu_product import Matrix, Rows, accumulators, add_products, multiply

# Pages are multiples of so many keys.
STEP = 2 * LANES
# Queries per call: with two vectors of keys, 16 accumulators.
QUERIES = 8
# Rows of weights per call.
MOST = 4


def _scorer(most: int) -> Any:
    """Every number of queries is compiled by itself."""

    @intrinsic
    def score(typingctx, queries, first, rows, keys, count, out):
        """`queries[first : first + rows] @ keys[:, :count]` into the first rows of `out`.

        Of what is written behind the last key up to the next `STEP` no matter.

        Args, none of which is checked:
            queries: float32 `[n, head_dim]`, or uint32 `[n, head_dim / 2]` of bfloat16 pairs.
            first: of the queries.
            rows: how many, 1 to `most`.
            keys: `[head_dim, block]` as in the cache, or uint32 `[head_dim / 2, block]` of pairs.
            count: 1 to `block`.
            out: float32 `[most, block]`, or `[block]` for one.
        """

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            given, _, _, page, _, found = _pointers(context, builder, signature, args)
            length = _shape(context, builder, signature.args[0], args[0])[1]
            kind = signature.args[0].dtype
            head_dim = builder.mul(length, I64(2 if kind == types.uint32 else 1))
            depth, block = _shape(context, builder, signature.args[3], args[3])
            size = builder.mul(depth, block)
            matrix = Matrix(signature.args[3].dtype, page, block, page, size)
            steps = builder.udiv(builder.add(args[4], I64(STEP - 1)), I64(STEP))
            for number in range(1, most + 1):
                with builder.if_then(builder.icmp_signed("==", args[2], I64(number))):
                    starts = [
                        builder.mul(builder.add(args[1], I64(r)), length) for r in range(number)
                    ]
                    with cgutils.for_range(builder, steps) as loop:
                        column = builder.mul(loop.index, I64(STEP))
                        sums = accumulators(builder, number, STEP // LANES)
                        multiply(builder, Rows(kind, given, starts), matrix, column, head_dim, sums)
                        for r, row in enumerate(sums):
                            place = builder.add(builder.mul(I64(r), block), column)
                            for v, accumulator in enumerate(row):
                                pointer = at(
                                    builder, found, builder.add(place, I64(LANES * v)), VF32
                                )
                                builder.store(builder.load(accumulator), pointer, align=4)
            return context.get_dummy_value()

        kinds = queries, types.intp, types.intp, keys, types.intp, out
        return types.void(*kinds), codegen

    return score


score_one, score_many = _scorer(1), _scorer(QUERIES)


@intrinsic
def add_values(typingctx, weights, values, first, rows, count, sums):
    """`sums[r] += weights[r, :count] @ values[:count]` for `first <= r < first + rows`.

    Args, none of which is checked:
        weights: float32 `[n, block]`.
        values: `[block, head_dim]`, as in the cache.
        first: of the rows.
        rows: how many, 1 to `MOST`.
        count: 1 to `block`.
        sums: float32 `[n, head_dim]`.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        given, page, _, _, _, found = _pointers(context, builder, signature, args)
        block, head_dim = _shape(context, builder, signature.args[1], args[1])
        size = builder.mul(head_dim, block)
        matrix = Matrix(signature.args[1].dtype, page, head_dim, page, size)
        for number in range(1, MOST + 1):
            with builder.if_then(builder.icmp_signed("==", args[3], I64(number))):
                chosen = [builder.add(args[2], I64(r)) for r in range(number)]
                left = Rows(types.float32, given, [builder.mul(row, block) for row in chosen])
                starts = [builder.mul(row, head_dim) for row in chosen]
                add_products(builder, left, matrix, args[4], found, starts)
        return context.get_dummy_value()

    kinds = weights, values, types.intp, types.intp, types.intp, sums
    return types.void(*kinds), codegen


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
