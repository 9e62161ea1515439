"""Intervals and tests for proportions, paired where the same samples were answered twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Proportion:
    """A share of a number of cases, with Wilson's 95 % interval."""

    count: int
    total: int
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """How often one of two ways was right where the other was wrong, on the same samples.

    Attributes:
        gained: samples that were wrong and became right.
        lost: samples that were right and became wrong.
        difference: of the accuracies; above 0 where more were gained than lost.
        low: of the 95 % percentile bootstrap interval of the difference.
        high: of the same.
        p_value: of the exact McNemar test, two-sided.
    """

    gained: int
    lost: int
    difference: float
    low: float
    high: float
    p_value: float


def proportion(count: int, total: int) -> Proportion:
    """`count` of `total` cases, one at least, with its interval."""
    interval = stats.binomtest(count, total).proportion_ci(CONFIDENCE, method="wilson")
    return Proportion(count, total, count / total, float(interval.low), float(interval.high))


def paired_difference(
    before: Sequence[bool], after: Sequence[bool], seed: int = 0
) -> PairedDifference:
    """Compare two ways of answering the same samples, at least one, in the same order."""
    pairs = list(zip(before, after, strict=True))
    gained = sum(now and not then for then, now in pairs)
    lost = sum(then and not now for then, now in pairs)
    low, high = _interval(gained, lost, len(pairs), seed)
    return PairedDifference(
        gained, lost, (gained - lost) / len(pairs), low, high, mcnemar(gained, lost)
    )


def mcnemar(gained: int, lost: int) -> float:
    """p-value of the exact two-sided McNemar test; 1 where nothing changed."""
    changed = gained + lost
    return float(stats.binomtest(gained, changed).pvalue) if changed else 1.0


def _interval(gained: int, lost: int, total: int, seed: int) -> tuple[float, float]:
    # Samples drawn with replacement are +1, -1 or 0: their counts are multinomial.
    shares = [gained / total, lost / total, (total - gained - lost) / total]
    drawn = np.random.default_rng(seed).multinomial(total, shares, size=RESAMPLES)
    differences = (drawn[:, 0] - drawn[:, 1]) / total
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(differences, [tail, 1 - tail])
    return float(low), float(high)
