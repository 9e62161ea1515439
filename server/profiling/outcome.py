"""What a profile does on samples that it was not chosen on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from calibrators.profiles import Estimate
from server.evaluation.comparison import BASELINE, SIGNIFICANT
from server.evaluation.report import percent, points, share
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
class Accuracies:
    """Right answers without the profile and with it, on the same samples."""

    metric: ClassVar[str] = "accuracy"

    baseline: Side
    result: Side
    difference: PairedDifference

    @classmethod
    def of(cls, before: Sequence[Values], after: Sequence[Values], seed: int) -> Accuracies:
        """The comparison of measurements of the same samples, in the same order."""
        was, is_now = ([bool(v["accuracy"]) for v in side] for side in (before, after))
        return cls(Side.of(before), Side.of(after), paired_difference(was, is_now, seed))

    @property
    def estimates(self) -> tuple[Estimate, Estimate]:
        """The metric without the profile and with it."""
        return _estimate(self.baseline.accuracy), _estimate(self.result.accuracy)

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """A table, its header first."""
        return [
            ("report samples", "accuracy (95 %)", "valid", "among valid"),
            (BASELINE, *_cells(self.baseline)),
            ("profile", *_cells(self.result)),
        ]

    @property
    def change(self) -> str:
        """What the profile changes, in a sentence with figures."""
        found = self.difference
        return (
            f"Against the baseline: {points(found)} points of accuracy, {found.gained} samples "
            f"gained, {found.lost} lost, p {found.p_value:.3g}."
        )

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


def _estimate(found: Proportion) -> Estimate:
    # Wilson's interval holds the share but for rounding, at 0 and at 1.
    low, high = min(found.low, found.value), max(found.high, found.value)
    return Estimate(value=found.value, low=low, high=high)


def _cells(side: Side) -> tuple[str, str, str]:
    among = "" if side.among_valid is None else percent(side.among_valid.value)
    return share(side.accuracy), percent(side.valid.value), among
