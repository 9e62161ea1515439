"""Results as JSON, as a table and as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from server.evaluation.comparison import Row, verdict
from server.evaluation.runs import Latency, Outcome, Run
from server.evaluation.statistics import PairedDifference, Proportion

HEADER = (
    "calibration",
    "accuracy (95 %)",
    "valid",
    "among valid",
    "against baseline (95 %)",
    "gained, lost",
    "p",
    "s per sample: mean, p50, p90",
)
NOTES = """\
Brackets hold 95 % intervals: Wilson's for shares, a bootstrap over samples for differences.
p is of the exact McNemar test against the baseline on the same samples. For the verdict it is
multiplied by the number of calibrations compared. Seconds are those of this machine with
{concurrency} samples at a time."""


@dataclass(frozen=True, slots=True)
class Results:
    """An evaluation.

    Attributes:
        facts: what was measured, where and when, for people and programs.
        concurrency: samples under way at a time.
        rows: the baseline first.
    """

    facts: Mapping[str, Any]
    concurrency: int
    rows: Sequence[Row]

    def document(self) -> dict[str, Any]:
        """Everything, as JSON."""
        return {
            **self.facts,
            "concurrency": self.concurrency,
            "verdict": verdict(self.rows),
            "rows": [_row(row) for row in self.rows],
        }

    def table(self) -> str:
        """A line per row, in Markdown that reads well on a terminal."""
        return aligned([HEADER, *(_cells(row) for row in self.rows)])

    def summary(self) -> str:
        """Verdict and remarks."""
        return "\n".join([*verdict(self.rows), *_remarks(self.rows)])

    def page(self) -> str:
        """The report, in Markdown."""
        facts = [f"- {name}: {_inline(value)}" for name, value in self.facts.items()]
        parts = [
            "# Evaluation",
            "\n".join(facts),
            self.table(),
            "\n\n".join([*verdict(self.rows), *_remarks(self.rows)]),
            NOTES.format(concurrency=self.concurrency),
        ]
        return "\n\n".join(parts) + "\n"


def _row(row: Row) -> dict[str, Any]:
    measured = {} if row.run is None else _run(row.run)
    difference = None if row.difference is None else asdict(row.difference)
    return {
        "calibration": row.calibration,
        "error": row.error,
        "difference": difference,
        **measured,
    }


def _run(run: Run) -> dict[str, Any]:
    among_valid = run.accuracy_among_valid
    return {
        "accuracy": asdict(run.accuracy),
        "valid": asdict(run.valid),
        "accuracy_among_valid": None if among_valid is None else asdict(among_valid),
        "latency": asdict(run.latency),
        "seconds": run.seconds,
        "digests": run.digests,
        "skipped": run.skipped,
        "outcomes": [_outcome(outcome) for outcome in run.outcomes],
    }


def _outcome(outcome: Outcome) -> dict[str, Any]:
    return {
        "id": outcome.sample.id,
        "answer": outcome.sample.answer,
        "correct": outcome.correct,
        "seconds": outcome.seconds,
        **asdict(outcome.verdict),
    }


def _cells(row: Row) -> tuple[str, ...]:
    if row.run is None:
        return (row.name, "error", *[""] * (len(HEADER) - 2))
    run, among_valid = row.run, row.run.accuracy_among_valid
    return (
        row.name,
        share(run.accuracy),
        percent(run.valid.value),
        "" if among_valid is None else percent(among_valid.value),
        *_difference(row.difference),
        _latency(run.latency),
    )


def share(found: Proportion) -> str:
    """A share with its interval."""
    return f"{percent(found.value)} ({percent(found.low)} to {percent(found.high)})"


def percent(value: float) -> str:
    """A share without its interval."""
    return f"{value:.1%}"


def _difference(difference: PairedDifference | None) -> tuple[str, str, str]:
    if difference is None:
        return "", "", ""
    return (
        points(difference),
        f"{difference.gained}, {difference.lost}",
        f"{difference.p_value:.3g}",
    )


def points(difference: PairedDifference) -> str:
    """A difference of accuracies in percentage points, with its interval."""
    value, low, high = (
        f"{100 * x:+.1f}" for x in (difference.difference, difference.low, difference.high)
    )
    return f"{value} ({low} to {high})"


def _latency(latency: Latency) -> str:
    return f"{latency.mean:.2f}, {latency.p50:.2f}, {latency.p90:.2f}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up, the header first."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    )


def _remarks(rows: Sequence[Row]) -> list[str]:
    failed = [f"{row.name}: error: {row.error}" for row in rows if row.error is not None]
    skipped = [
        f"{row.name}: {row.run.skipped} samples were left alone by a method; receipts say why."
        for row in rows
        if row.run is not None and row.run.skipped
    ]
    return failed + skipped


def _inline(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {inner}" for name, inner in value.items())
    return str(value)
