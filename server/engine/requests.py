"""State of calibrated requests in a worker, keyed by request id."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from calibrators.interface import Bound, Calibrator, ModelFacts, Prompt, Rows
from server.engine.guard import attempt
from server.engine.payload import Payload
from server.engine.programs import HeadShard, Program
from server.engine.taps.peaks import PeakTable
from server.engine.text_pass import NAME, TextPass

if TYPE_CHECKING:
    from calibrators.interface import IntArray


@dataclass(slots=True)
class CalibratedRequest:
    """A request with its programs.

    Attributes:
        ticket: finds the receipt in the front end.
        prompt: geometry of the prompt.
        programs: one per calibration, in order.
        covered: positions below this are in the tallies; recomputing them after a preemption
            adds nothing.
        failed: a calibrator raised or a result was not finite; the request will be answered with
            an error.
    """

    ticket: str
    prompt: Prompt
    programs: list[Program]
    covered: int = 0
    failed: bool = False


class RequestTable:
    """Calibrated requests by id, from the step that schedules them to the one that frees them.

    A request that is preempted stays: it comes back with the same id and settings.

    Attributes:
        changes: how often requests came and went.
    """

    def __init__(
        self, calibrators: Mapping[str, Calibrator], facts: ModelFacts, shard: HeadShard
    ) -> None:
        self._calibrators = {**calibrators, NAME: TextPass()}
        self._facts = facts
        self._shard = shard
        self._peaks = PeakTable()
        self._requests: dict[str, CalibratedRequest] = {}
        self.changes = 0

    def __len__(self) -> int:
        return len(self._requests)

    def get(self, request_id: str) -> CalibratedRequest | None:
        """The request, None if it is plain."""
        return self._requests.get(request_id)

    def add(
        self, request_id: str, extra_args: Mapping[str, Any] | None, prompt: Prompt, cached: int
    ) -> None:
        """Take up a newly scheduled request; whatever had this id before is overwritten.

        Args:
            request_id: the engine's id.
            extra_args: of its sampling parameters.
            prompt: geometry of the prompt, as far as the engine knows it.
            cached: prompt tokens whose KV came out of the prefix cache.
        """
        payload = Payload.from_extra_args(extra_args)
        if payload is None:
            self.drop([request_id])
            return
        self.changes += 1
        length, prompt = prompt.length, payload.prompt or prompt
        made = [
            attempt(bound.method, partial(self._program, bound, prompt, payload.text_outputs))
            for bound in payload.calibrations
        ]
        programs = [program for program in made if program is not None]
        for program in programs:
            skipped = positions(program.rows, 0, min(cached, prompt.length), prompt.length)
            program.tally.prompt_tokens = program.tally.cached = len(skipped)
        self._requests[request_id] = CalibratedRequest(
            payload.ticket,
            prompt,
            programs,
            covered=cached,
            # Of another prompt than the one that came, its images would be elsewhere.
            failed=None in made or prompt.length != length,
        )

    def drop(self, request_ids: Iterable[str]) -> list[CalibratedRequest]:
        """Forget finished and aborted requests; those that there were."""
        found = (self._requests.pop(request_id, None) for request_id in request_ids)
        dropped = [request for request in found if request is not None]
        self.changes += len(dropped)
        return dropped

    def _program(self, bound: Bound, prompt: Prompt, text_outputs: Mapping[str, str]) -> Program:
        calibrator = self._calibrators[bound.method]
        model = self._facts, self._shard
        return Program(calibrator, bound, prompt, *model, self._peaks, text_outputs)


def positions(rows: Rows, start: int, stop: int, prompt_length: int) -> IntArray:
    """Calibrated positions among `start <= i < stop`, int32, ascending."""
    if not rows.generated:
        stop = min(stop, prompt_length)
    chosen = np.arange(max(start, rows.first), max(stop, rows.first, start), dtype=np.int32)
    for span in rows.skip:
        chosen = chosen[(chosen < span.start) | (chosen >= span.stop)]
    return chosen
