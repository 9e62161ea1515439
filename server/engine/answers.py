"""Asks a calibrator for the coefficients of a step, layer by layer.

On the CPU what it answers is traced and compiled, if that can be: a call into torch for each of its
operations takes several times as long as the attention kernels of a small batch.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calibrators.interface import Calibrator
from server.engine.coefficients import Change, Done, account, as_masses, asked
from server.engine.guard import attempt
from server.engine.ranks import Gather
from server.engine.stack import Stack
from server.kernels.partials import RowMap

if TYPE_CHECKING:
    from server.kernels.cpu_formula import Compiled

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Traced:
    """A calibrator's answer, compiled.

    Attributes:
        compiled: fills `touched`, `factors` and numbers per row: whether it is touched, how much
            of it is counted, and sums of statistics.
        statistics: their names.
    """

    compiled: Compiled
    statistics: tuple[str, ...]


@lru_cache(maxsize=64)
def traced(method: type[Calibrator], heads: int, columns: int) -> Traced | None:
    """The compiled form of what a method answers for so many heads and columns, if it has one."""
    make = partial(_trace, method, heads, columns)
    return attempt(method.__name__, make, "torch computes its coefficients")


def compile_for(calibrator: Calibrator, heads: int) -> None:
    """Compile what can be compiled of a method now, so that no request waits for it."""
    pools = len(calibrator.pools)
    columns = 2 * pools if attempt(calibrator.name, partial(_weighs, calibrator)) else pools
    traced(type(calibrator), heads, columns + 1)


def _weighs(calibrator: Calibrator) -> bool:
    """Whether a method takes part of its masses by weight."""
    pools = len(calibrator.pools)
    masses = as_masses(torch.full((1, 2, 2 * pools + 1), 0.1), pools)
    parameters = {name: torch.full((1, 2), 0.5) for name in calibrator.parameters}
    return calibrator.coefficients(masses, parameters).weighted is not None


def _trace(method: type[Calibrator], heads: int, columns: int) -> Traced | None:
    # Neither numba nor torch's tracer is of use where the layers are on an accelerator.
    from server.kernels import cpu_formula
    from server.kernels.cpu_formula_loops import Unknown

    calibrator = method()
    names: list[str] = []

    def formula(mass: Tensor, selected: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(calibrator.parameters, parameters, strict=True))
        masses = as_masses(mass, len(calibrator.pools))
        change = asked(calibrator, masses, given, selected)
        names[:] = change.statistics
        numbers = [change.touched.float(), change.counted.float()]
        numbers += [torch.where(change.counted, each, 0.0) for each in change.statistics.values()]
        sums = (number.sum(-1, keepdim=True) for number in numbers)
        return change.touched, change.factors, *sums

    tables = [torch.bool, *(torch.float32 for _ in calibrator.parameters)]
    try:
        compiled = cpu_formula.compiled(formula, heads, columns, tables)
    except Unknown as error:
        logger.info("the coefficients of %s have no compiled form: %s", calibrator.name, error)
        return None
    return Traced(compiled, tuple(names))


class Answers:
    """Asks a calibrator layer by layer, and keeps the account.

    With `gather`, it is asked with the heads of all ranks.
    """

    def __init__(
        self, calibrator: Calibrator, stack: Stack, rows: RowMap, gather: Gather | None
    ) -> None:
        self._calibrator, self._stack, self._gather = calibrator, stack, gather
        self._rows = rows
        self._slot = rows.slot.long().to(stack.device)
        self._direct = in_order(rows, stack)
        self._traces = gather is None and stack.device.type == "cpu"
        self._changes: list[Change] = []
        # What is compiled reads tables of the stack, by layer.
        self._tables: dict[int, list[npt.NDArray[Any]]] = {}
        # By the names of its statistics: `[layers, numbers, rows, 1]`.
        self._sums: dict[tuple[str, ...], npt.NDArray[np.float32]] = {}

    def ask(self, layer: int, mass: Tensor) -> tuple[Tensor, Tensor]:
        """Bool `[rows, heads]`, outputs to rewrite, and factors `[rows, heads, columns]`.

        Raises:
            Exception: whatever the calibrator raises, or its answer does not fit.
        """
        found = None
        if self._traces:
            found = traced(type(self._calibrator), mass.shape[1], mass.shape[2])
        if found is not None:
            return self._computed(found, layer, mass)
        parameters = {n: self._by_row(t[layer]) for n, t in self._stack.parameters.items()}
        heads = self._by_row(self._stack.heads[layer])
        masses = as_masses(mass, len(self._calibrator.pools))
        change = asked(self._calibrator, masses, parameters, heads, self._own)
        self._changes.append(change)
        return change.touched, change.factors

    def _computed(self, found: Traced, layer: int, mass: Tensor) -> tuple[Tensor, Tensor]:
        rows, heads, _ = mass.shape
        touched, factors = torch.empty(rows, heads, dtype=torch.bool), torch.empty_like(mass)
        tables, names = self._tables.get(layer), found.statistics
        if tables is None:
            stack = self._stack
            given = stack.heads[layer], *(table[layer] for table in stack.parameters.values())
            tables = self._tables[layer] = [table.numpy() for table in given]
        if names not in self._sums:
            layers = len(self._stack.heads)
            self._sums[names] = np.zeros((layers, 2 + len(names), rows, 1), np.float32)
        answer = touched.numpy(), factors.numpy(), *self._sums[names][layer]
        found.compiled(mass.numpy(), self._rows.arrays[2], *tables, *answer)
        return touched, factors

    def _by_row(self, per_slot: Tensor) -> Tensor:
        return per_slot if self._direct else per_slot[self._slot]

    def _own(self, per_head: Tensor) -> Tensor:
        """The part of this rank."""
        return per_head if self._gather is None else per_head[:, self._stack.programs[0].own]

    def clear(self) -> None:
        """Forget what was answered."""
        self._changes.clear()
        for sums in self._sums.values():
            sums.fill(0)

    def account(self, finite: Tensor) -> Done:
        """All layers of the step together."""
        done = account(self._changes, finite)
        sums = {**done.sums}
        rewritten, count = done.rewritten, done.count
        for names, layers in self._sums.items():
            touched, counted, *totals = layers.sum(0, np.float64)[..., 0]
            rewritten, count = rewritten | (touched > 0), count + counted
            for name, total in zip(names, totals, strict=True):
                sums[name] = sums.get(name, 0.0) + total
        return Done(done.finite, rewritten, count, sums)


def in_order(rows: RowMap, stack: Stack) -> bool:
    """A row per slot, as where all generate: tables are taken as they are."""
    return np.array_equal(rows.arrays[2], np.arange(len(stack.programs)))
