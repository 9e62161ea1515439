"""The baseline and calibrations over the same samples, side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from server.evaluation.api import Calibration
from server.evaluation.runs import Run, RunFailed, run
from server.evaluation.samples import Sample
from server.evaluation.scoring import Scorer
from server.evaluation.statistics import PairedDifference

BASELINE = "baseline"
SIGNIFICANT = 0.05


@dataclass(frozen=True, slots=True)
class Row:
    """A calibration and what came of it: a run, or an error.

    Attributes:
        calibration: None is the baseline.
        run: its outcomes; None where there is an error.
        error: why there are none.
        difference: to the baseline; None for itself, and where one of them has no outcomes.
    """

    calibration: Calibration
    run: Run | None = None
    error: str | None = None
    difference: PairedDifference | None = None

    @property
    def name(self) -> str:
        """The calibration in one line."""
        return named(self.calibration)


def named(calibration: Calibration) -> str:
    """A calibration in one line, as it would be typed."""
    if calibration is None:
        return BASELINE
    return calibration if isinstance(calibration, str) else json.dumps(calibration)


async def compare(
    scorer: Scorer,
    samples: Sequence[Sample],
    calibrations: Sequence[Calibration],
    concurrency: int,
    seed: int,
    progress: Callable[[str], None],
) -> list[Row]:
    """The baseline's row and one for each calibration; a run that fails costs its row alone."""
    rows: list[Row] = []
    for calibration in (None, *calibrations):
        progress(f"{named(calibration)}: {len(samples)} samples")
        try:
            result = await run(scorer, samples, calibration, concurrency)
        except RunFailed as failure:
            progress(f"{named(calibration)}: {failure}")
            rows.append(Row(calibration, error=str(failure)))
            continue
        baseline = rows[0].run if rows else None
        difference = None if baseline is None else result.against(baseline, seed)
        rows.append(Row(calibration, result, difference=difference))
    return rows


def verdict(rows: Sequence[Row]) -> list[str]:
    """What the rows say, in sentences.

    With several calibrations one of them may be ahead by chance. So p-values are multiplied by
    their number before they are judged (Bonferroni).
    """
    compared = [(row.name, row.difference) for row in rows if row.difference is not None]
    if not compared:
        return ["Nothing was compared with the baseline."]
    told = [
        (name, difference.difference)
        for name, difference in compared
        if difference.p_value * len(compared) < SIGNIFICANT
    ]
    sentences = [
        f"{name} is significantly {'better' if change > 0 else 'worse'} than the baseline."
        for name, change in told
    ]
    if not any(change > 0 for _, change in told):
        sentences.insert(0, "No calibration is significantly better than the baseline at 5 %.")
    return sentences
