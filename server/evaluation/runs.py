"""A calibration, or none, over a set of samples."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import httpx
import numpy as np

from server.evaluation.api import ApiFailure, Calibration, Refused
from server.evaluation.flags import CONCURRENCY
from server.evaluation.samples import Sample
from server.evaluation.scoring import Scorer, Verdict
from server.evaluation.statistics import PairedDifference, Proportion, paired_difference, proportion


class RunFailed(Exception):
    """A sample got no usable answer, so there is no result; names sample and reason.

    Attributes:
        refused: the server refuses the calibration or the sample: status 400.
    """

    def __init__(self, message: str, *, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused


@dataclass(frozen=True, slots=True)
class Outcome:
    """A sample and what came of it.

    Attributes:
        sample: that was asked.
        verdict: of the model.
        seconds: from the first byte of its first request to the last of its last answer.
    """

    sample: Sample
    verdict: Verdict
    seconds: float

    @property
    def correct(self) -> bool:
        """Whether the right choice was taken."""
        return self.verdict.choice == self.sample.answer

    @property
    def valid(self) -> bool:
        """Whether any choice was taken."""
        return self.verdict.choice is not None


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds per sample."""

    mean: float
    p50: float
    p90: float


@dataclass(frozen=True, slots=True)
class Run:
    """Outcomes of one calibration, in the order of the samples.

    Attributes:
        calibration: as it was sent; None is the baseline.
        outcomes: one per sample.
        seconds: from the first sample sent to the last answered.
    """

    calibration: Calibration
    outcomes: tuple[Outcome, ...]
    seconds: float

    @property
    def accuracy(self) -> Proportion:
        """Right answers among all samples."""
        return _share(outcome.correct for outcome in self.outcomes)

    @property
    def valid(self) -> Proportion:
        """Samples whose answer was one of the choices."""
        return _share(outcome.valid for outcome in self.outcomes)

    @property
    def accuracy_among_valid(self) -> Proportion | None:
        """Right answers among the valid ones; None without any."""
        valid = [outcome for outcome in self.outcomes if outcome.valid]
        return _share(outcome.correct for outcome in valid) if valid else None

    @property
    def latency(self) -> Latency:
        """How long samples took, with as many others at the same time as the run allows."""
        seconds = [outcome.seconds for outcome in self.outcomes]
        p50, p90 = np.quantile(seconds, [0.5, 0.9])
        return Latency(float(np.mean(seconds)), float(p50), float(p90))

    @property
    def digests(self) -> tuple[str, ...]:
        """Of the receipts: one, or none for the baseline."""
        receipts = (r for outcome in self.outcomes for r in outcome.verdict.receipts)
        return tuple(sorted({receipt.digest for receipt in receipts}))

    @property
    def skipped(self) -> int:
        """Samples that a method left alone."""
        return sum(any(r.skipped for r in o.verdict.receipts) for o in self.outcomes)

    def against(self, baseline: Run, seed: int = 0) -> PairedDifference:
        """The difference to a run over the same samples."""
        before, after = ([outcome.correct for outcome in run.outcomes] for run in (baseline, self))
        return paired_difference(before, after, seed)


def _share(cases: Iterable[bool]) -> Proportion:
    seen = list(cases)
    return proportion(sum(seen), len(seen))


async def run(
    scorer: Scorer,
    samples: Sequence[Sample],
    calibration: Calibration = None,
    concurrency: int = CONCURRENCY,
) -> Run:
    """Ask every sample, `concurrency` at a time, none of them twice.

    The first sample is asked once beforehand, uncounted: a calibration that the server refuses
    costs one request, and the first of a kind of requests is slower than the others.

    Args:
        scorer: asks one sample.
        samples: one at least.
        calibration: of every request; None for plain ones.
        concurrency: samples that are under way at the same time.

    Raises:
        RunFailed: a sample got no usable answer; the others are given up.
    """
    slots = asyncio.Semaphore(concurrency)
    await _outcome(scorer, samples[0], calibration, slots)
    started = time.perf_counter()
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(_outcome(scorer, sample, calibration, slots))
                for sample in samples
            ]
    except ExceptionGroup as group:
        failed, others = group.split(RunFailed)
        if failed is None or others is not None:
            raise
        raise failed.exceptions[0] from None
    result = Run(calibration, tuple(task.result() for task in tasks), time.perf_counter() - started)
    if len(result.digests) > 1:
        raise RunFailed(f"receipts of one calibration have the digests {result.digests}")
    return result


async def _outcome(
    scorer: Scorer, sample: Sample, calibration: Calibration, slots: asyncio.Semaphore
) -> Outcome:
    async with slots:
        started = time.perf_counter()
        try:
            verdict = await scorer.ask(sample, calibration)
        except ApiFailure as error:
            message = f"sample {sample.id}: {error}"
            raise RunFailed(message, refused=isinstance(error, Refused)) from None
        except httpx.TransportError as error:
            reason = str(error) or type(error).__name__
            raise RunFailed(f"sample {sample.id}: the request failed: {reason}") from None
        return Outcome(sample, verdict, time.perf_counter() - started)
