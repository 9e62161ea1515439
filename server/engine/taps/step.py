"""One method's observations in one step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from calibrators.interface import Prefill
from server.engine.agreement import agreed
from server.engine.batch import prompt_rows
from server.engine.guard import attempt
from server.engine.taps.peaks import PeakTap

if TYPE_CHECKING:
    from torch import Tensor

    from calibrators.interface import FloatArray, Observation
    from server.engine.batch import Member
    from server.engine.programs import Program
    from server.engine.ranks import Gather
    from server.engine.stack import Stack
    from server.engine.taps.tap import Tap, View
    from server.kernels.partials import RowMap


class StepTaps:
    """Measures what a method observes in the prompts of a step, and has it resolve its layers.

    A prompt that is computed again is measured again. If one was cut otherwise than its method
    asked, or anything of it is missing or not finite, its request fails. Ranks observe together:
    all see the heads of all, and what fails on one fails on all.
    """

    def __init__(
        self,
        batch: Sequence[Member],
        programs: Sequence[Program],
        stack: Stack,
        gather: Gather | None = None,
    ) -> None:
        self._batch = batch
        self._gather = gather
        self._programs = programs
        self._stack = stack
        self._due: dict[int, list[tuple[int, Tap]]] = {}
        self._ready: dict[int, list[int]] = {}
        self._observed: dict[int, dict[Observation, FloatArray]] = {}
        self._prompts: dict[tuple[int, ...], RowMap] = {}
        resolved: set[int] = set()
        for slot, (member, program) in enumerate(zip(batch, programs, strict=True)):
            length = program.prompt.length
            if not program.taps or member.start >= length or program.abandoned:
                continue
            if _cut_as_asked(program.prefill, member, length):
                resolved |= self._watch(slot, member.start, min(member.stop, length))
            else:
                self._fail(slot)
        for layer in resolved:
            self._stack.renew(layer)

    def followed(self) -> set[int]:
        """Layers into which the residual stream has to be followed."""
        due = self._due.items()
        return {layer for layer, taps in due if any(isinstance(tap, PeakTap) for _, tap in taps)}

    def wait_for(self, layer: int) -> bool:
        """Whether anything is to be measured or resolved in a layer."""
        return layer in self._due or layer in self._ready

    def enter(self, layer: int, hidden: Tensor, residual: Tensor | None) -> None:
        """Look at the residual stream that enters a layer."""
        for slot, tap in self._alive(layer):
            if isinstance(tap, PeakTap):
                tap.enter(self._batch[slot], hidden, residual)

    def resolve(self, layer: int, view: View) -> None:
        """Measure in a layer, and resolve it where nothing is missing any more."""
        due = self._alive(layer)
        # A block may be in the prefix cache already that a neighbour computes in this step: all
        # have to put down what they know before anybody reads.
        kinds: dict[type[Tap], list[tuple[Member, Tap]]] = {}
        for slot, tap in due:
            kinds.setdefault(type(tap), []).append((self._batch[slot], tap))
        for kind, pairs in kinds.items():
            kind.take(pairs, view)
        slots = [s for s in self._ready.get(layer, ()) if not self._programs[s].abandoned]
        made = []
        for slot in slots:
            local = [tap for s, tap in due if s == slot and tap.local]
            made.append(self._observe(slot, local) and self._resolve(slot, layer))
        if slots:
            self._settle(slots, made)
            self._stack.renew(layer)

    def prompts(self, members: Sequence[Member]) -> RowMap:
        """The rows of prompts, mapped once."""
        key = tuple(member.row for member in members)
        if key not in self._prompts:
            self._prompts[key] = prompt_rows(members)
        return self._prompts[key]

    def _alive(self, layer: int) -> list[tuple[int, Tap]]:
        due = self._due.get(layer, ())
        return [(slot, tap) for slot, tap in due if not self._programs[slot].abandoned]

    def _watch(self, slot: int, start: int, stop: int) -> frozenset[int]:
        """Find what to measure in a stretch of a prompt; layers resolved by what was before."""
        program = self._programs[slot]
        for tap in program.taps:
            if tap.due(start, stop):
                self._due.setdefault(tap.layer, []).append((slot, tap))
        late = [tap for tap in program.taps if not tap.local]
        if late and stop < program.prompt.length:
            return frozenset()
        local = [tap for tap in program.taps if tap.local]
        missing = {tap.layer for tap in local if not tap.due(start, stop)}
        for layer in {tap.layer for tap in local} - missing:
            self._ready.setdefault(layer, []).append(slot)
        if not late:
            return frozenset()
        layers = program.observed - {tap.layer for tap in local}
        seen = self._observe(slot, late)
        made = seen and all(self._resolve(slot, layer) for layer in sorted(layers))
        self._settle([slot], [made])
        return layers

    def _observe(self, slot: int, taps: Sequence[Tap]) -> bool:
        """Take up what taps have measured; whether it is all there and finite."""
        for tap in taps:
            values = self._everywhere(tap)
            if values is None or not np.isfinite(values).all():
                return False
            self._observed.setdefault(slot, {})[tap.observation] = values
        return True

    def _everywhere(self, tap: Tap) -> FloatArray | None:
        """What a tap has measured on the heads of all ranks.

        Whether it has anything is told by positions, and so the same on all of them.
        """
        values = tap.value()
        if values is None or self._gather is None:
            return values
        shape = values.shape if tap.by_head else (1, *values.shape)
        own = torch.from_numpy(values).reshape(1, shape[0], math.prod(shape[1:]))
        every: FloatArray = self._gather(own).numpy()[0].reshape(-1, *shape[1:])
        # What all have may still be rounded differently: the first rank's counts.
        return every if tap.by_head else every[:1].reshape(values.shape)

    def _resolve(self, slot: int, layer: int) -> bool:
        """Have a program resolve a layer with what it observes there, and with its blocks."""
        program, observed = self._programs[slot], self._observed[slot]
        seen = {
            tap.observation: observed[tap.observation]
            for tap in program.taps
            if tap.layer == layer or not tap.local
        }
        return attempt(program.calibrator.name, partial(program.resolve, layer, seen)) is not None

    def _settle(self, slots: Sequence[int], made: Sequence[bool]) -> None:
        """Fail what was not made, here or on another rank."""
        if self._gather is not None:
            mine = zip(slots, made, strict=True)
            made = agreed([[self._programs[s]] if ok else None for s, ok in mine], self._gather)
        for slot, ok in zip(slots, made, strict=True):
            if not ok:
                self._fail(slot)

    def _fail(self, slot: int) -> None:
        self._batch[slot].request.failed = True
        self._programs[slot].abandon()
        for layer in range(len(self._stack.heads)):
            self._stack.renew(layer)


def _cut_as_asked(prefill: Prefill, member: Member, length: int) -> bool:
    if prefill is Prefill.WHOLE:
        return member.start == 0 and member.stop >= length
    if prefill is Prefill.SPLIT_LAST:
        return member.stop < length or member.start == length - 1
    return True
