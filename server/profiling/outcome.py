"""What a profile does on samples that it was not chosen on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server.evaluation.comparison import SIGNIFICANT
from server.evaluation.statistics import (
    PairedDifference,
    Proportion,
    paired_difference,
    proportion,
)
from server.profiling.questions import Values


@dataclass(frozen=True, slots=True)
class Side:
    """Shares of the report samples, without the profile or with it."""

    accuracy: Proportion
    valid: Proportion
    among_valid: Proportion | None

    @classmethod
    def of(cls, measured: Sequence[Values]) -> Side:
        """Shares of samples, one at least."""
        right = sum(bool(values["accuracy"]) for values in measured)
        valid = sum(bool(values["valid"]) for values in measured)
        among_valid = proportion(right, valid) if valid else None
        total = len(measured)
        return cls(proportion(right, total), proportion(valid, total), among_valid)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Baseline and profile on the same samples."""

    baseline: Side
    result: Side
    difference: PairedDifference

    @classmethod
    def of(cls, before: Sequence[Values], after: Sequence[Values], seed: int) -> Outcome:
        """The comparison of measurements of the same samples, in the same order."""
        was, is_now = ([bool(v["accuracy"]) for v in side] for side in (before, after))
        return cls(Side.of(before), Side.of(after), paired_difference(was, is_now, seed))

    @property
    def verdict(self) -> str:
        """Whether it helps, in a sentence."""
        change, p = self.difference.difference, self.difference.p_value
        if change <= 0:
            worse = ", significantly" if change < 0 and p < SIGNIFICANT else ""
            how = f"lower{worse}" if change < 0 else "the same"
            return f"The profile did not help: accuracy on the report samples is {how}."
        if p < SIGNIFICANT:
            return "The profile helps: accuracy on the report samples is significantly higher."
        return (
            "No help was shown: accuracy on the report samples is higher, but not significantly "
            "at 5 %."
        )
