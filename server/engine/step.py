"""Calibration of one engine step: stacked once, applied layer by layer, tallied at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calibrators.interface import Calibrator, Masses
from server.engine.batch import Member, pool_map, row_map
from server.engine.guard import attempt
from server.engine.ranks import Share, Union, alone
from server.engine.requests import Program
from server.kernels import cpu as kernels
from server.kernels.partials import AttentionGeometry, PagedCache, PoolMap, RowMap

if TYPE_CHECKING:
    from calibrators.interface import IntArray


@dataclass(frozen=True, slots=True)
class Stack:
    """Tables of all requests of one method in the step, first dimension the layer.

    Attributes:
        heads: bool `[layers, slots, heads]`.
        parameters: float32 of the same shape, by name.
        pools: per layer.
        active: layers with any selected head.
    """

    heads: Tensor
    parameters: Mapping[str, Tensor]
    pools: list[PoolMap]
    active: frozenset[int]

    @classmethod
    def of(cls, programs: Sequence[Program]) -> Stack:
        """Stack the tables of `programs`, one slot each."""
        heads = np.stack([program.heads for program in programs], axis=1)
        parameters = {
            name: torch.from_numpy(np.stack([p.parameters[name] for p in programs], axis=1))
            for name in programs[0].calibrator.parameters
        }
        active = np.flatnonzero(heads.any((1, 2)))
        return cls(
            torch.from_numpy(heads), parameters, _pools(programs), frozenset(active.tolist())
        )


def _pools(programs: Sequence[Program]) -> list[PoolMap]:
    """Pool maps by layer; requests whose pools are the same in all layers are mapped once."""
    layers = [[program.pools[layer] for program in programs] for layer in range(_depth(programs))]
    maps: list[PoolMap] = []
    for layer, pools in enumerate(layers):
        same = layer > 0 and _same(pools, layers[layer - 1])
        maps.append(maps[-1] if same else pool_map(pools))
    return maps


def _depth(programs: Sequence[Program]) -> int:
    return len(programs[0].pools)


def _same(left: Sequence[tuple[IntArray, ...]], right: Sequence[tuple[IntArray, ...]]) -> bool:
    return all(
        np.array_equal(a, b)
        for one, other in zip(left, right, strict=True)
        for a, b in zip(one, other, strict=True)
    )


@dataclass(frozen=True, slots=True)
class Change:
    """What a calibrator does to its rows in one layer.

    Attributes:
        touched: bool `[rows, heads]`, outputs that are rewritten.
        factors: float32 `[rows, heads, pools]`, head scale included.
        rest: float32 `[rows, heads]`, head scale included.
        statistics: float32 `[rows, heads]` each.
    """

    touched: Tensor
    factors: Tensor
    rest: Tensor
    statistics: Mapping[str, Tensor]


class MethodStep:
    """One method's share of a step."""

    def __init__(self, batch: Sequence[Member], programs: Sequence[Program], stack: Stack) -> None:
        self.calibrator: Calibrator = programs[0].calibrator
        self.seconds = 0.0
        self._batch = batch
        self._programs = programs
        self._stack = stack
        self._rows: RowMap = row_map(batch, programs)
        self._slot = self._rows.slot.long()
        # Per row for all layers at once.
        self._selected = stack.heads[:, self._slot]
        self._parameters = {name: table[:, self._slot] for name, table in stack.parameters.items()}
        self._finite = torch.ones(len(self._slot), dtype=torch.bool)
        self._touched: list[Tensor] = []
        self._statistics: list[Mapping[str, Tensor]] = []

    def apply(
        self,
        layer: int,
        query: Tensor,
        output: Tensor,
        cache: PagedCache,
        geometry: AttentionGeometry,
    ) -> None:
        """Rewrite this method's rows of the stock `output` `[tokens, heads, head_dim]`."""
        if layer not in self._stack.active or not len(self._slot):
            return
        started = time.perf_counter()
        heads = self._stack.heads[layer]
        partials = kernels.pool_partials(
            query, cache, self._rows, self._stack.pools[layer], heads, geometry
        )
        change = attempt(self.calibrator.name, partial(self._change, layer, partials.mass))
        if change is None:
            self._finite[:] = False
            return
        self._finite &= kernels.combine(
            output, self._rows, change.touched, partials, change.factors, change.rest
        )
        self._touched.append(change.touched)
        self._statistics.append(change.statistics)
        self.seconds += time.perf_counter() - started

    def _change(self, layer: int, mass: Tensor) -> Change:
        """Ask the calibrator, and have its answer in the shapes and types of the kernels.

        Those check nothing: whatever does not fit has to raise here.
        """
        parameters = {name: table[layer] for name, table in self._parameters.items()}
        result = self.calibrator.coefficients(Masses(mass), parameters)
        selected = self._selected[layer]
        touched = selected if result.apply is None else selected & result.apply
        factors = mass if result.pools is None else result.pools
        rest = result.rest
        if result.scale is not None:
            factors, rest = factors * result.scale[..., None], rest * result.scale
        return Change(
            touched.expand_as(selected).contiguous(),
            factors.float().expand_as(mass).contiguous(),
            rest.float().expand(selected.shape).contiguous(),
            {name: s.float().expand(selected.shape) for name, s in result.statistics.items()},
        )

    def share(self) -> Share:
        """What this rank did, new positions only."""
        count = np.zeros(len(self._batch))
        finite = self._finite.numpy()
        if not self._touched:
            return Share(np.zeros(len(finite), np.bool_), finite, count, {})
        covered = np.array([member.request.covered for member in self._batch])
        fresh = self._rows.position.numpy() >= covered[self._slot.numpy()]
        touched = torch.stack(self._touched).numpy() & fresh[:, None]
        sums = {
            name: self._per_slot((self._stacked(name) * touched).sum((0, 2)))
            for name in self._statistics[0]
        }
        return Share(touched.any((0, 2)), finite, self._per_slot(touched.sum((0, 2))), sums)

    def tally(self, share: Share) -> None:
        """Add what all ranks did to the tallies of the requests."""
        slot = self._slot.numpy()
        for failed in slot[~share.finite].tolist():
            self._batch[failed].request.failed = True
        lengths = np.array([member.request.prompt.length for member in self._batch])
        prompt = self._rows.position.numpy() < lengths[slot]
        prompt_tokens = self._per_slot(share.done & prompt)
        completion_tokens = self._per_slot(share.done & ~prompt)
        for index, program in enumerate(self._programs):
            tally = program.tally
            tally.prompt_tokens += int(prompt_tokens[index])
            tally.completion_tokens += int(completion_tokens[index])
            tally.count += int(share.count[index])
            for name, values in share.sums.items():
                tally.sums[name] = tally.sums.get(name, 0.0) + float(values[index])

    def _stacked(self, statistic: str) -> npt.NDArray[np.float32]:
        stacked: npt.NDArray[np.float32] = torch.stack(
            [layer[statistic] for layer in self._statistics]
        ).numpy()
        return stacked

    def _per_slot(self, per_row: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        slots = len(self._batch)
        weights = per_row.astype(np.float64)
        return np.bincount(self._slot.numpy(), weights, minlength=slots).astype(np.float64)


class StepPlan:
    """All calibration of one step.

    Built where the attention metadata is built, in the batch's order of that moment; used by
    every layer; tallied when the forward pass is over.
    """

    def __init__(self, batch: Sequence[Member], methods: Sequence[MethodStep]) -> None:
        self._batch = batch
        self._methods = methods

    def apply(
        self,
        layer: int,
        query: Tensor,
        output: Tensor,
        cache: PagedCache,
        geometry: AttentionGeometry,
    ) -> None:
        """Rewrite the calibrated rows of one layer, methods in order."""
        for method in self._methods:
            method.apply(layer, query, output, cache, geometry)

    def finish(self, union: Union = alone) -> dict[str, float]:
        """Tally what `union` makes of this rank's shares; seconds spent by calibrator."""
        shares = union({method.calibrator.name: method.share() for method in self._methods})
        for method in self._methods:
            method.tally(shares[method.calibrator.name])
        for member in self._batch:
            member.request.covered = max(member.request.covered, member.stop)
        return {method.calibrator.name: method.seconds for method in self._methods}


class Planner:
    """Builds step plans, and stacks tables anew only when the calibrated requests change."""

    def __init__(self) -> None:
        # The programs are held with their stack: identity is only meaningful while both live.
        self._stacks: dict[str, tuple[Sequence[Program], Stack]] = {}

    def plan(self, batch: Sequence[Member]) -> StepPlan:
        """The plan of a step whose calibrated requests are `batch`."""
        methods = []
        for name in _method_names(batch):
            pairs = [
                (member, program)
                for member in batch
                for program in member.request.programs
                if program.calibrator.name == name
            ]
            programs = [program for _, program in pairs]
            methods.append(
                MethodStep([member for member, _ in pairs], programs, self._stack(name, programs))
            )
        return StepPlan(batch, methods)

    def _stack(self, name: str, programs: Sequence[Program]) -> Stack:
        known = self._stacks.get(name)
        if known is not None and _identical(known[0], programs):
            return known[1]
        stack = Stack.of(programs)
        self._stacks[name] = (programs, stack)
        return stack


def _identical(left: Sequence[Program], right: Sequence[Program]) -> bool:
    return len(left) == len(right) and all(a is b for a, b in zip(left, right, strict=True))


def _method_names(batch: Sequence[Member]) -> list[str]:
    """Methods in the batch; those that reweight come before those that scale heads."""
    calibrators = {
        program.calibrator.name: program.calibrator
        for member in batch
        for program in member.request.programs
    }
    return sorted(calibrators, key=lambda name: not calibrators[name].reweights)
