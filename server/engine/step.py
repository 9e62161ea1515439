"""Calibration of one engine step: stacked once, applied layer by layer, tallied at the end."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calibrators.interface import Calibrator
from server.engine.batch import Member, row_map
from server.engine.coefficients import Done
from server.engine.programs import Program
from server.engine.ranks import Gather, Share, Union, alone
from server.engine.rewrites import rewrite
from server.engine.stack import HOST, Stack
from server.engine.taps.step import StepTaps
from server.engine.taps.tap import View
from server.kernels import dispatch as kernels
from server.kernels.partials import AttentionGeometry, PagedCache, RowMap, StridedCache

if TYPE_CHECKING:
    from server.engine.requests import CalibratedRequest


class MethodStep:
    """One method's share of a step."""

    def __init__(
        self,
        batch: Sequence[Member],
        programs: Sequence[Program],
        stack: Stack,
        gather: Gather | None = None,
    ) -> None:
        self.calibrator: Calibrator = programs[0].calibrator
        self.seconds = 0.0
        self._batch = batch
        self._programs = programs
        self._stack = stack
        self._taps = StepTaps(batch, programs, stack, gather)
        self._rows = row_map(batch, programs)
        self._any = len(self._rows.token) > 0
        complete = _complete(batch, self._rows)
        self._rewrite = rewrite(self.calibrator, stack, self._rows, complete, gather)
        self._computed: dict[frozenset[int], frozenset[int]] = {}

    def followed(self) -> set[int]:
        """Layers into which the residual stream has to be followed."""
        return self._taps.followed()

    def idle(self, layer: int) -> bool:
        """Whether nothing is to be done in a layer, as far as is known when it comes."""
        return not (layer in self._stack.active or self._taps.wait_for(layer))

    def enter(self, layer: int, hidden: Tensor, residual: Tensor | None) -> None:
        """See what enters a layer."""
        started = time.perf_counter()
        self._taps.enter(layer, hidden, residual)
        self.seconds += time.perf_counter() - started

    def apply(
        self,
        layer: int,
        query: Tensor,
        output: Tensor,
        cache: PagedCache | StridedCache,
        geometry: AttentionGeometry,
        stock: Tensor | None = None,
    ) -> None:
        """Rewrite this method's rows of the stock `output` `[tokens, heads, head_dim]`."""
        started = time.perf_counter()
        self._taps.resolve(layer, View(query, output, cache, geometry, self._taps.prompts))
        if self._any and layer in self._stack.active:
            heads = self._stack.heads[layer]
            given = query, cache, self._rows, heads, geometry, stock
            self._rewrite.apply(layer, partial(kernels.attention, *given), output)
        self.seconds += time.perf_counter() - started

    def advance(self, starts: npt.NDArray[Any]) -> None:
        """Become the same step one token later; `starts` `[requests]` are rows of the query."""
        self._rows.move_on(starts)
        self.seconds = 0.0
        self._rewrite.restart()

    def done(self) -> Done:
        """What was done in the step, by row."""
        return self._rewrite.done()

    @property
    def owners(self) -> list[tuple[Member, Program]]:
        """Whose the rows are."""
        slots = self._rows.arrays[2].tolist()
        return [(self._batch[slot], self._programs[slot]) for slot in slots]

    def computed(self, layer: int) -> frozenset[int]:
        """Rows of the batch's block table whose outputs this method computes from nothing."""
        slots = self._rewrite.computed(layer)
        if slots not in self._computed:
            self._computed[slots] = frozenset(self._batch[slot].row for slot in slots)
        return self._computed[slots]

    def share(self) -> Share:
        """What this rank did, new positions only."""
        done = self._rewrite.done()
        covered = np.array([member.request.covered for member in self._batch])
        fresh = self._rows.arrays[3] >= covered[self._rows.arrays[2]]
        return Share(
            fresh & done.rewritten,
            done.finite,
            self._per_slot(done.count * fresh),
            {name: self._per_slot(values * fresh) for name, values in done.sums.items()},
        )

    def tally(self, share: Share) -> None:
        """Add what all ranks did to the tallies of the requests."""
        _, _, slot, position, _ = self._rows.arrays
        for failed in slot[~share.finite].tolist():
            self._batch[failed].request.failed = True
        lengths = np.array([member.request.prompt.length for member in self._batch])
        prompt = position < lengths[slot]
        prompts = self._per_slot(share.done & prompt).tolist()
        completions = self._per_slot(share.done & ~prompt).tolist()
        counts, sums = share.count.tolist(), {n: v.tolist() for n, v in share.sums.items()}
        for index, program in enumerate(self._programs):
            tally = program.tally
            tally.prompt_tokens += int(prompts[index])
            tally.completion_tokens += int(completions[index])
            tally.count += int(counts[index])
            for name, totals in sums.items():
                tally.sums[name] = tally.sums.get(name, 0.0) + totals[index]

    def _per_slot(self, per_row: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        totals = np.bincount(self._rows.arrays[2], per_row, minlength=len(self._batch))
        return totals.astype(np.float64, copy=False)


def _complete(batch: Sequence[Member], rows: RowMap) -> frozenset[int]:
    """The slots of which every row in this step is calibrated."""
    counts = np.bincount(rows.arrays[2], minlength=len(batch)).tolist()
    return frozenset(
        slot for slot, member in enumerate(batch) if counts[slot] == member.stop - member.start
    )


class StepPlan:
    """All calibration of one step.

    Built where the attention metadata is built, in the batch's order of that moment; used by
    every layer; tallied when the forward pass is over.

    Attributes:
        batch: the calibrated requests.
        methods: in the order they are applied.
    """

    def __init__(self, batch: Sequence[Member], methods: Sequence[MethodStep]) -> None:
        self.batch = batch
        self.methods = methods

    def idle(self, layer: int) -> bool:
        """Whether a layer is left to the stock kernel."""
        return all(method.idle(layer) for method in self.methods)

    def computed(self, layer: int) -> frozenset[int]:
        """Rows of the block table whose outputs the stock kernel need not compute in a layer."""
        return frozenset().union(*(method.computed(layer) for method in self.methods))

    def followed(self) -> set[int]:
        """Layers into which the residual stream has to be followed."""
        return set().union(*(method.followed() for method in self.methods))

    def enter(self, layer: int, hidden: Tensor, residual: Tensor | None) -> None:
        """Let methods see `[tokens, hidden_size]` on its way into one layer; the sum of both."""
        for method in self.methods:
            method.enter(layer, hidden, residual)

    def apply(
        self,
        layer: int,
        query: Tensor,
        output: Tensor,
        cache: PagedCache | StridedCache,
        geometry: AttentionGeometry,
        stock: Tensor | None = None,
    ) -> None:
        """Rewrite the calibrated rows of one layer, methods in order.

        `stock` are log-sum-exps `[query_heads, tokens]` where the stock kernel gives them.
        """
        for method in self.methods:
            method.apply(layer, query, output, cache, geometry, stock)

    def finish(self, union: Union = alone) -> dict[str, float]:
        """Tally what `union` makes of this rank's shares; seconds spent by calibrator."""
        shares = union({method.calibrator.name: method.share() for method in self.methods})
        for method in self.methods:
            method.tally(shares[method.calibrator.name])
        for member in self.batch:
            member.request.covered = max(member.request.covered, member.stop)
        return {method.calibrator.name: method.seconds for method in self.methods}


class Planner:
    """Builds step plans, and stacks tables anew only when the calibrated requests change.

    Args:
        gather: brings the heads of all ranks together; None where this one has them all.
        device: where the layers are computed.
    """

    def __init__(self, gather: Gather | None = None, device: torch.device = HOST) -> None:
        self._gather = gather
        self._device = device
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
            members, programs = [member for member, _ in pairs], [program for _, program in pairs]
            stack = self._stack(name, programs)
            methods.append(MethodStep(members, programs, stack, self._gather))
        return StepPlan(batch, methods)

    def forget(self, requests: Iterable[CalibratedRequest]) -> None:
        """Let go of the tables of requests that are over: they will not be stacked alike again."""
        gone = {id(program) for request in requests for program in request.programs}
        if gone:
            self._stacks = {
                name: known
                for name, known in self._stacks.items()
                if not any(id(program) in gone for program in known[0])
            }

    def _stack(self, name: str, programs: Sequence[Program]) -> Stack:
        known = self._stacks.get(name)
        if known is not None and _identical(known[0], programs):
            return known[1]
        stack = Stack.of(programs, self._device)
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
