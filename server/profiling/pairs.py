"""Many (candidate, sample) pairs under way at once, through one server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import fmean
from typing import TypeAlias

import httpx

from server.evaluation.api import ApiFailure
from server.evaluation.samples import Sample
from server.profiling.questions import Question, Values
from server.profiling.search import Candidate, Score, Stage
from server.profiling.state import State

Bar: TypeAlias = Callable[[str, int, int], AbstractContextManager[Callable[[], object]]]
"""Given name, total and what is done of it: a block whose function is called once per pair."""


class MeasurementFailed(Exception):
    """A sample got no usable answer; names candidate, sample and reason."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """Measures stages of a search.

    Attributes:
        questions: by name.
        state: what was measured before, and takes what is.
        concurrency: pairs under way at a time.
        bar: shows the progress.
    """

    questions: Mapping[str, Question]
    state: State
    concurrency: int
    bar: Bar

    async def measure(self, stage: Stage, samples: Sequence[Sample]) -> list[list[Values]]:
        """Values by candidate and sample, in their order, whichever came first.

        Raises:
            MeasurementFailed: a pair has no result; the others under way are given up.
        """
        pairs = [(c, s) for c in stage.candidates for s in samples]
        missing = [(c, s) for c, s in pairs if self._known(stage, c, s) is None]
        # Without a barrier between candidates: requests of different ones share a batch.
        queue = iter(missing)
        with self.bar(stage.name, len(pairs), len(pairs) - len(missing)) as advance:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(self.concurrency, len(missing))):
                        group.create_task(self._work(stage, queue, advance))
            except* MeasurementFailed as failures:
                failed = failures.exceptions[0]
                raise failed from None
        return [
            [value for s in samples if (value := self._known(stage, c, s)) is not None]
            for c in stage.candidates
        ]

    async def _work(
        self,
        stage: Stage,
        queue: Iterator[tuple[Candidate, Sample]],
        advance: Callable[[], object],
    ) -> None:
        question = self.questions[stage.asked]
        for candidate, sample in queue:
            try:
                values = await question.ask(sample, candidate.calibration)
            except (ApiFailure, httpx.TransportError) as error:
                reason = str(error) or type(error).__name__
                raise MeasurementFailed(
                    f"{stage.name}, {candidate.label}, sample {sample.id}: {reason}"
                ) from None
            self.state.add(stage.asked, candidate, sample.id, values)
            advance()

    def _known(self, stage: Stage, candidate: Candidate, sample: Sample) -> Values | None:
        return self.state.get(stage.asked, candidate, sample.id)


def mean(measured: Sequence[Values]) -> Score:
    """Means over samples, whose values have the same names."""
    return {name: fmean(values[name] for values in measured) for name in measured[0]}
