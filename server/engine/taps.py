"""What calibrators want to see of a layer's attention, measured in the middle of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from calibrators.interface import ColumnMeans
from server.engine.batch import Member, row_map
from server.engine.guard import attempt
from server.engine.programs import Program
from server.engine.stack import Stack
from server.kernels import cpu as kernels
from server.kernels.partials import AttentionGeometry, PagedCache

if TYPE_CHECKING:
    from calibrators.interface import FloatArray


class Taps:
    """Measures one method's layers whose prompts are in this step, and has them resolved.

    A prompt that is computed again is measured again. One that comes in pieces cannot be measured;
    the scheduler does not cut it, and if it was cut all the same, its request fails.
    """

    def __init__(self, batch: Sequence[Member], programs: Sequence[Program], stack: Stack) -> None:
        self._batch = batch
        self._programs = programs
        self._stack = stack
        self._waiting: dict[int, list[int]] = {}
        for slot, (member, program) in enumerate(zip(batch, programs, strict=True)):
            length = program.prompt.length
            if not program.observed or member.start >= length:
                continue
            if member.start == 0 and member.stop >= length:
                for layer in program.observed:
                    self._waiting.setdefault(layer, []).append(slot)
            else:
                self._fail(slot)

    def resolve(
        self, layer: int, query: Tensor, cache: PagedCache, geometry: AttentionGeometry
    ) -> None:
        """Resolve a layer of the programs that wait for it; before its output is rewritten."""
        slots = [s for s in self._waiting.get(layer, ()) if not self._batch[s].request.failed]
        if not slots:
            return
        wanted = [self._programs[slot].observed[layer] for slot in slots]
        measured = self._means(slots, wanted, query, cache, geometry)
        for slot, observation, means in zip(slots, wanted, measured, strict=True):
            program = self._programs[slot]
            resolve = partial(program.resolve, layer, {observation: means})
            finite = bool(np.isfinite(means).all())
            if not finite or attempt(program.calibrator.name, resolve) is None:
                self._fail(slot)
        self._stack.renew(layer)

    def _means(
        self,
        slots: Sequence[int],
        wanted: Sequence[ColumnMeans],
        query: Tensor,
        cache: PagedCache,
        geometry: AttentionGeometry,
    ) -> list[FloatArray]:
        """Column means `[query_heads, P]` of each slot's prompt."""
        lengths = [self._programs[slot].prompt.length for slot in slots]
        whole = [replace(self._batch[s], stop=n) for s, n in zip(slots, lengths, strict=True)]
        heads = torch.zeros(len(slots), query.shape[1], dtype=torch.bool)
        for index, observation in enumerate(wanted):
            heads[index, slice(None) if observation.heads is None else observation.heads] = True
        attention = kernels.Attention(query, cache, row_map(whole), heads, geometry)
        return np.split(attention.column_means().numpy(), np.cumsum(lengths)[:-1], axis=1)

    def _fail(self, slot: int) -> None:
        self._batch[slot].request.failed = True
        self._programs[slot].abandon()
        for layer in range(len(self._stack.heads)):
            self._stack.renew(layer)
