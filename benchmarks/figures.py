"""From measured seconds to ratios with their spread."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio measured several times.

    Attributes:
        middle: the figure to quote.
        low: the smallest seen.
        high: the largest seen.
    """

    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.3f} ({self.low:.3f}..{self.high:.3f})"


def paired(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """Ratio of each pair of neighbouring measurements; their median is the figure.

    Neighbours share whatever else the machine was doing, so that drift cancels.
    """
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def of_medians(
    numerators: Sequence[Sequence[float]], denominators: Sequence[Sequence[float]]
) -> Ratio:
    """Ratio of the medians of all measurements; spread over the starts they came from.

    Args:
        numerators: seconds by server start.
        denominators: the same of the other server, started in turn with it.
    """
    middle = statistics.median(_flat(numerators)) / statistics.median(_flat(denominators))
    starts = paired(
        [statistics.median(start) for start in numerators],
        [statistics.median(start) for start in denominators],
    )
    return Ratio(middle, min(starts.low, middle), max(starts.high, middle))


def _flat(groups: Iterable[Iterable[float]]) -> list[float]:
    return [value for group in groups for value in group]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)
