"""A figure that was measured several times."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """Measurements of one figure.

    Attributes:
        middle: the figure to quote.
        low: the smallest seen.
        high: the largest seen.
    """

    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return self.shown(3)

    def shown(self, digits: int) -> str:
        """The figure with its smallest and largest value, with `digits` decimals."""
        return f"{self.middle:.{digits}f} ({self.low:.{digits}f}..{self.high:.{digits}f})"


def spread(values: Sequence[float]) -> Spread:
    """Median of measurements, one at least, with the smallest and the largest."""
    return Spread(statistics.median(values), min(values), max(values))


def paired(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Ratio of each pair of neighbouring measurements; their median is the figure.

    Neighbours share whatever else the machine was doing, so that drift cancels.
    """
    return spread([a / b for a, b in zip(numerators, denominators, strict=True)])
