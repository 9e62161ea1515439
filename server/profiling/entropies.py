"""What a profile does to the next token's entropy, where right answers are not known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy import stats

from calibrators.profiles import Estimate
from server.evaluation.comparison import BASELINE, SIGNIFICANT
from server.evaluation.statistics import CONFIDENCE
from server.profiling.questions import Values


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over samples with Student's 95 % interval, in nats."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """The mean of some values; without spread, and of one alone, it is the interval."""
        mean, error = float(np.mean(values)), 0.0
        if len(values) > 1:
            quantile = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
            error = float(quantile * stats.sem(values))
        return cls(mean, mean - error, mean + error)

    def __str__(self) -> str:
        return f"{self.value:.4f} ({self.low:.4f} to {self.high:.4f})"


@dataclass(frozen=True, slots=True)
class Entropies:
    """Mean entropies without the profile and with it, on the same samples.

    Attributes:
        difference: of each sample's entropies; below 0 where the model became surer.
    """

    metric: ClassVar[str] = "mean entropy of the next token, in nats"

    baseline: Mean
    result: Mean
    difference: Mean

    @classmethod
    def of(cls, before: Sequence[Values], after: Sequence[Values]) -> Entropies:
        """The comparison of measurements of the same samples, in the same order."""
        plain, tuned = ([values["entropy"] for values in side] for side in (before, after))
        changes = [b - a for a, b in zip(plain, tuned, strict=True)]
        return cls(Mean.of(plain), Mean.of(tuned), Mean.of(changes))

    @property
    def estimates(self) -> tuple[Estimate, Estimate]:
        """See `outcome.Accuracies`."""
        plain, tuned = (
            Estimate(value=mean.value, low=mean.low, high=mean.high)
            for mean in (self.baseline, self.result)
        )
        return plain, tuned

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """See `outcome.Accuracies`."""
        return [
            ("report samples", "entropy in nats (95 %)"),
            (BASELINE, str(self.baseline)),
            ("profile", str(self.result)),
        ]

    @property
    def change(self) -> str:
        """See `outcome.Accuracies`."""
        return f"Against the baseline: {self.difference} nats."

    @property
    def verdict(self) -> str:
        """See `outcome.Accuracies`."""
        if self.difference.high < 0:
            surer = f"The model is surer with the profile, significantly at {SIGNIFICANT:.0%}"
        else:
            surer = "The profile did not help: the model is not significantly surer with it"
        return f"{surer}; whether its answers are better was not measured."
