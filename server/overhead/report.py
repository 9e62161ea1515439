"""Figures of a comparison as JSON and as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from server.evaluation.report import aligned
from server.overhead.candidates import LeftOut
from server.overhead.rounds import Round, Row
from server.overhead.spread import Spread, paired, spread

Figure: TypeAlias = Callable[[Round], float | None]

NOTES = """\
TTFT: time to first token; TPOT: time per output token after it; both of a round's median request.
Figures are medians over the rounds, with the smallest and the largest. Ratios are those of a round
to the plain one beside it; above 1 a time is longer, and a throughput higher."""


@dataclass(frozen=True, slots=True)
class Measure:
    """What is measured of a round.

    Attributes:
        key: in JSON.
        title: in the table.
        digits: decimals in the table.
        of: its value; None where a round has none.
    """

    key: str
    title: str
    digits: int
    of: Figure


def _milliseconds(figure: Figure) -> Figure:
    def scaled(played: Round) -> float | None:
        seconds = figure(played)
        return None if seconds is None else 1000 * seconds

    return scaled


MEASURES = (
    Measure("ttft_ms", "TTFT ms", 0, _milliseconds(lambda played: played.ttft)),
    Measure("tpot_ms", "TPOT ms", 1, _milliseconds(lambda played: played.tpot)),
    Measure("output_tokens_per_s", "output tokens/s", 1, lambda played: played.throughput),
)


@dataclass(frozen=True, slots=True)
class Results:
    """A comparison.

    Attributes:
        facts: what was measured, where and how.
        rows: plain requests first.
        left_out: calibrators that were not measured.
    """

    facts: Mapping[str, Any]
    rows: Sequence[Row]
    left_out: Sequence[LeftOut] = ()

    def document(self) -> dict[str, Any]:
        """Everything, as JSON."""
        return {
            **self.facts,
            "rows": [self._document(row) for row in self.rows],
            "left_out": [asdict(each) for each in self.left_out],
        }

    def table(self) -> str:
        """A line per row, in Markdown that reads well on a terminal."""
        titles = [title for measure in MEASURES for title in (measure.title, "to plain")]
        return aligned([("calibration", *titles), *(self._cells(row) for row in self.rows)])

    def remarks(self) -> list[str]:
        """What has no figures, and why."""
        failed = [f"{row.name}: error: {row.error}" for row in self.rows if row.error is not None]
        return failed + [f"left out: {each.calibrator}: {each.reason}" for each in self.left_out]

    def _ratio(self, row: Row, measure: Measure) -> Spread | None:
        plain = values(self.rows[0], measure)
        ours = values(row, measure)
        return None if row.calibration is None or not ours else paired(ours, plain)

    def _document(self, row: Row) -> dict[str, Any]:
        figures = {
            measure.key: {
                "value": _described(_spread(row, measure)),
                "to_plain": _described(self._ratio(row, measure)),
            }
            for measure in MEASURES
        }
        return {
            "calibration": row.calibration,
            "error": row.error,
            "digest": row.digest,
            **figures,
            "rounds": [_round(played) for played in row.rounds],
        }

    def _cells(self, row: Row) -> tuple[str, ...]:
        if row.error is not None:
            return (row.name, "error", *[""] * (2 * len(MEASURES) - 1))
        return (row.name, *(cell for measure in MEASURES for cell in self._pair(row, measure)))

    def _pair(self, row: Row, measure: Measure) -> Iterator[str]:
        found, ratio = _spread(row, measure), self._ratio(row, measure)
        yield "" if found is None else found.shown(measure.digits)
        yield "" if ratio is None else ratio.shown(2)


def values(row: Row, measure: Measure) -> list[float]:
    """The measure of every round; empty where rounds have none."""
    found = map(measure.of, row.rounds)
    return [value for value in found if value is not None]


def _spread(row: Row, measure: Measure) -> Spread | None:
    found = values(row, measure)
    return spread(found) if found else None


def _described(found: Spread | None) -> dict[str, float] | None:
    return None if found is None else {"median": found.middle, "min": found.low, "max": found.high}


def _round(played: Round) -> dict[str, Any]:
    return {
        "seconds": played.seconds,
        "requests": [
            {
                "ttft_ms": 1000 * timing.ttft,
                "tpot_ms": None if timing.tpot is None else 1000 * timing.tpot,
                "prompt_tokens": timing.prompt_tokens,
                "output_tokens": timing.output_tokens,
            }
            for timing in played.timings
        ],
    }
