"""Products of a few rows with a block of a matrix, in LLVM vectors.

Both products of attention are of this kind: queries with keys, whose pages lie channel by channel,
and probabilities with values, whose pages lie key by key. Neither page has to be turned.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils

from server.kernels.cpu_llvm import (
    I16,
    I32,
    I64,
    LANES,
    VF32,
    VI32,
    at,
    each,
    load,
    load_float,
    multiply_add,
    multiply_add_pairs,
    splat,
)

# The host multiplies pairs of bfloat16 into float32.
PAIRS = bool(llvm.get_host_cpu_features().get("avx512bf16"))
# A matrix of 16 KiB is asked for this far ahead, and then the next.
AHEAD = 4096
CACHE_LINE = 64
# Vectors of columns that are summed at a time, where there are as many; they come in twos.
COLUMNS = 4


@dataclass(frozen=True)
class Rows:
    """Rows of the left matrix: float32, or uint32 of bfloat16 pairs.

    Attributes:
        kind: numba's type of an element.
        data: pointer to elements.
        starts: where each row starts.
    """

    kind: Any
    data: Any
    starts: Sequence[Any]

    @property
    def pairs(self) -> bool:
        """Whether two successive elements are multiplied at a time."""
        return bool(self.kind == types.uint32)


@dataclass(frozen=True)
class Matrix:
    """The right matrix, `[depth, columns]`.

    Attributes:
        kind: numba's type of an element: float32, uint16 for bfloat16, int16 for float16, or uint32
            for pairs of bfloat16 from two rows of the matrix, one above the other.
        data: pointer to elements.
        columns: elements per row.
        following: pointer to what will be read next, as large as this matrix; not read from pairs.
        size: rows times columns.
    """

    kind: Any
    data: Any
    columns: Any
    following: Any
    size: Any


def accumulators(builder: Any, rows: int, vectors: int) -> list[list[Any]]:
    """Zeroes, `[rows, vectors]`, which LLVM keeps in registers."""
    sums = [[cgutils.alloca_once(builder, VF32) for _ in range(vectors)] for _ in range(rows)]
    for accumulator in (a for row in sums for a in row):
        builder.store(each(0.0), accumulator)
    return sums


def multiply(
    builder: Any, rows: Rows, matrix: Matrix, column: Any, depth: Any, sums: list[list[Any]]
) -> None:
    """Add `rows[:, :depth] @ matrix[:depth, column:]` to `sums`, as wide as they are."""
    if not rows.pairs:
        with cgutils.for_range(builder, depth) as loop:
            _prefetch(builder, rows, matrix, loop.index, column, len(sums[0]))
            _step(builder, rows, matrix, loop.index, column, sums)
        return
    with cgutils.for_range(builder, builder.lshr(depth, I64(1))) as loop:
        _prefetch(builder, rows, matrix, loop.index, column, len(sums[0]))
        _step(builder, rows, matrix, loop.index, column, sums)
    odd = builder.trunc(depth, ir.IntType(1))
    with builder.if_then(odd):
        _step(builder, rows, matrix, builder.lshr(depth, I64(1)), column, sums, single=True)


def add_products(
    builder: Any, rows: Rows, matrix: Matrix, depth: Any, sums: Any, starts: Sequence[Any]
) -> None:
    """Add `rows[:, :depth] @ matrix[:depth]` to rows of float32 `sums` that begin at `starts`."""

    def add(column: Any, width: int) -> None:
        found = accumulators(builder, len(starts), width)
        multiply(builder, rows, matrix, column, depth, found)
        for start, row in zip(starts, found, strict=True):
            for v, accumulator in enumerate(row):
                place = builder.add(builder.add(start, column), I64(LANES * v))
                pointer = at(builder, sums, place, VF32)
                total = builder.fadd(builder.load(pointer, align=4), builder.load(accumulator))
                builder.store(total, pointer, align=4)

    wide = builder.udiv(matrix.columns, I64(COLUMNS * LANES))
    with cgutils.for_range(builder, wide) as loop:
        add(builder.mul(loop.index, I64(COLUMNS * LANES)), COLUMNS)
    column = builder.mul(wide, I64(COLUMNS * LANES))
    with builder.if_then(builder.icmp_signed("<", column, matrix.columns)):
        add(column, COLUMNS // 2)


def _step(
    builder: Any,
    rows: Rows,
    matrix: Matrix,
    depth: Any,
    column: Any,
    sums: list[list[Any]],
    *,
    single: bool = False,
) -> None:
    """One element or pair of each row; of a pair's rows the lower does not count if `single`."""
    width = len(sums[0])
    if rows.pairs:
        right = _pairs(builder, matrix, depth, column, width, single)
    else:
        start = builder.add(builder.mul(depth, matrix.columns), column)
        places = [builder.add(start, I64(LANES * v)) for v in range(width)]
        right = [load_float(builder, matrix.kind, matrix.data, place) for place in places]
    add = multiply_add_pairs if rows.pairs else multiply_add
    for start, row in zip(rows.starts, sums, strict=True):
        left = builder.load(builder.gep(rows.data, [builder.add(start, depth)]))
        for vector, accumulator in zip(right, row, strict=True):
            total = builder.load(accumulator)
            builder.store(add(builder, vector, splat(builder, left), total), accumulator)


def _pairs(
    builder: Any, matrix: Matrix, depth: Any, column: Any, width: int, single: bool
) -> list[Any]:
    """Two rows of `width` vectors, the pair of each column in one 32-bit lane."""
    if matrix.kind == types.uint32:
        start = builder.add(builder.mul(depth, matrix.columns), column)
        found = [
            load(builder, matrix.data, builder.add(start, I64(LANES * v)), VI32)
            for v in range(width)
        ]
        upper = ir.Constant(VI32, [0xFFFF] * LANES)
        return [builder.and_(pair, upper) for pair in found] if single else found
    start = builder.add(builder.mul(depth, builder.mul(matrix.columns, I64(2))), column)
    found = []
    for v in range(0, width, 2):
        found += _zipped(builder, matrix, builder.add(start, I64(LANES * v)), single)
    return found


def _zipped(builder: Any, matrix: Matrix, start: Any, single: bool) -> list[Any]:
    """Two vectors of pairs from the row at `start` and the one below it."""
    both = ir.VectorType(I16, 2 * LANES)
    upper = load(builder, matrix.data, start, both)
    if single:
        lower = ir.Constant(both, [0] * (2 * LANES))
    else:
        lower = load(builder, matrix.data, builder.add(start, matrix.columns), both)
    found = []
    for half in range(2):
        lanes = range(half * LANES, (half + 1) * LANES)
        mask = [index for lane in lanes for index in (lane, lane + 2 * LANES)]
        chosen = ir.Constant(ir.VectorType(I32, 2 * LANES), mask)
        found.append(builder.bitcast(builder.shuffle_vector(upper, lower, chosen), VI32))
    return found


def _prefetch(
    builder: Any, rows: Rows, matrix: Matrix, depth: Any, column: Any, width: int
) -> None:
    """Ask for what comes `AHEAD` bytes on; hardware does so within 4 KiB only.

    Unpacked pairs lie in the nearest cache anyway.
    """
    if matrix.kind == types.uint32:
        return
    count, size = 2 if rows.pairs else 1, matrix.kind.bitwidth // 8
    start = builder.add(builder.mul(depth, builder.mul(matrix.columns, I64(count))), column)
    place = builder.add(start, I64(AHEAD // size))
    beyond = builder.icmp_signed(">=", place, matrix.size)
    data = builder.select(beyond, matrix.following, matrix.data)
    place = builder.select(beyond, builder.sub(place, matrix.size), place)
    for row in range(count):
        first = builder.add(place, builder.mul(I64(row), matrix.columns))
        for line in range(0, width * LANES, CACHE_LINE // size):
            ask(builder, builder.gep(data, [builder.add(first, I64(line))]))


def ask(builder: Any, pointer: Any) -> None:
    """Have what lies there brought near."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
    call = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(call, [builder.bitcast(pointer, byte), I32(0), I32(3), I32(1)])
