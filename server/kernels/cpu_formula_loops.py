"""Loops over the heads of a row, and the numbers they compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


class Unknown(ValueError):
    """An operation, or a use of one, that has no source here."""


@dataclass(eq=False)
class Loop:
    """Numbers computed together, for each head one of each; or lines of their own."""

    length: int
    cells: list[tuple[Cell, str]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def source(self) -> list[str]:
        """What is to be run for a row."""
        body = []
        for cell, expression in self.cells:
            body.append(f"    {cell.name} = {expression}")
            if cell.kept:
                body.append(f"    {cell.array}[h] = {cell.name}")
        return [f"for h in range({self.length}):", *body] if body else self.lines


@dataclass(eq=False)
class Cell:
    """A number per head, or one for all of them.

    Attributes:
        name: of the variable.
        dtype: of the number.
        length: heads that have one; 1 where all share it.
        loop: where it is computed; None where `name` is valid everywhere.
        kept: whether it is put down in an array.
    """

    name: str
    dtype: torch.dtype
    length: int
    loop: Loop | None = None
    kept: bool = False

    @property
    def array(self) -> str:
        """Where it is put down."""
        return f"{self.name}_"

    def read(self, loop: Loop) -> str:
        """The expression for it in a loop."""
        if self.loop is None or self.loop is loop:
            return self.name
        self.kept = True
        return f"{self.array}[{'h' if self.length > 1 else 0}]"


@dataclass(frozen=True)
class Value:
    """What an operation gave.

    Attributes:
        columns: side by side.
        deep: whether there is an axis for them.
    """

    columns: Sequence[Cell]
    deep: bool = False

    @property
    def flat(self) -> Cell:
        """The one column of a value without an axis for them."""
        if self.deep:
            raise Unknown("columns where there should be none")
        return self.columns[0]


class Loops:
    """All loops of a row, one after the other."""

    def __init__(self) -> None:
        self._loops: list[Loop] = []
        self._cells: list[Cell] = []

    def of(self, length: int) -> Loop:
        """Where a number per head may be computed: in the last loop if it is as long, or a new one.

        Lines of their own come between others for a reason.
        """
        if not self._loops or self._loops[-1].lines or self._loops[-1].length != length:
            self._loops.append(Loop(length))
        return self._loops[-1]

    def compute(self, expression: str, dtype: torch.dtype, loop: Loop) -> Cell:
        """Have a loop compute something for each head."""
        cell = self._cell(dtype, loop.length, loop)
        loop.cells.append((cell, expression))
        return cell

    def fill(self, dtype: torch.dtype, length: int) -> tuple[Loop, Cell]:
        """A new loop whose lines, yet to be written, fill the array of a cell."""
        loop = Loop(length)
        self._loops.append(loop)
        cell = self._cell(dtype, length, loop)
        cell.kept = True
        return loop, cell

    def array(self, cell: Cell) -> str:
        """The array of a cell, which there is from here on."""
        if cell.loop is None:
            loop = self.of(cell.length)
            cell = self.compute(cell.read(loop), cell.dtype, loop)
        cell.kept = True
        return cell.array

    def _cell(self, dtype: torch.dtype, length: int, loop: Loop) -> Cell:
        self._cells.append(Cell(f"v{len(self._cells)}", dtype, length, loop))
        return self._cells[-1]

    def arrays(self) -> list[str]:
        """Lines that make room for what is kept."""
        names = {torch.float32: "float32", torch.bool: "bool_", torch.int64: "int64"}
        kept = [cell for cell in self._cells if cell.kept]
        return [f"{cell.array} = np.empty({cell.length}, np.{names[cell.dtype]})" for cell in kept]

    def source(self) -> list[str]:
        """Lines to be run for each row."""
        return [line for loop in self._loops for line in loop.source()]
