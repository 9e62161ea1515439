"""A search as a generator: it yields candidates to score, is sent their scores, returns a choice.

It knows neither servers nor samples, so that it runs with any scores.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Asked: TypeAlias = Literal["answers", "entropy", "sinks"]
"""What is asked of a sample; see `questions`."""
Score: TypeAlias = Mapping[str, float]
"""Means over samples, by name."""
Gain: TypeAlias = tuple[float, ...]
"""By how much a score is better than another; the first number that is not 0 decides."""


class SearchFailed(Exception):
    """The scores leave nothing to choose; says why and what to try."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A calibration to score.

    Attributes:
        label: for people, distinct within its stage.
        calibration: the request field; None is the baseline.
    """

    label: str
    calibration: Mapping[str, Any] | None


BASELINE = Candidate("baseline", None)


@dataclass(frozen=True, slots=True)
class Stage:
    """Candidates that are scored together.

    Attributes:
        name: distinct within the search.
        asked: what is asked of each sample.
        candidates: one at least.
        limit: at most so many samples; None for all.
    """

    name: str
    asked: Asked
    candidates: tuple[Candidate, ...]
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """What a search has found.

    Attributes:
        parameters: of the method, as a profile holds them.
        remarks: sentences on how it came about.
    """

    parameters: Mapping[str, Any]
    remarks: tuple[str, ...]


Search: TypeAlias = Generator[Stage, Sequence[Score], Choice]


@dataclass(frozen=True, slots=True)
class Objective:
    """What makes a score better than another.

    Attributes:
        asked: what is asked of each sample.
        names: of the means, the one that decides first; a score may lack the later ones.
        sign: 1 where more is better, -1 where less is.
        unit: of the first, for people.
    """

    asked: Asked
    names: tuple[str, ...]
    sign: int
    unit: str

    def gain(self, score: Score, other: Score) -> Gain:
        """By how much `score` is better than `other`."""
        return tuple(self.sign * (score[n] - other[n]) for n in self.names if n in score)


ACCURACY = Objective("answers", ("accuracy", "margin"), 1, "accuracy")
ENTROPY = Objective("entropy", ("entropy",), -1, "entropy in nats")


def nothing(gain: Gain) -> Gain:
    """The gain of equal scores, to compare with."""
    return (0.0,) * len(gain)
