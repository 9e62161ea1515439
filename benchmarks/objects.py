"""What is said about objects against what is there: captions, yes/no questions, their figures."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from examples.shapes_llava.scenes import COLOURS, KINDS, SHAPES, Kind, Scene

CATEGORIES = ("random", "popular", "adversarial")
_KIND = re.compile(rf"\b({'|'.join(COLOURS)})\s+({'|'.join(SHAPES)})\b", re.IGNORECASE)
_YES_OR_NO = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)
# How many of the most frequent kinds are popular ones.
_POPULAR = 6


def mentioned(text: str) -> frozenset[Kind]:
    """The kinds that a caption names."""
    return frozenset(Kind(*(word.lower() for word in found)) for found in _KIND.findall(text))


def yes_or_no(text: str) -> bool | None:
    """What an answer begins with; None where it is neither."""
    found = _YES_OR_NO.match(text)
    return found.group(1).lower() == "yes" if found else None


class Occurrences:
    """How often kinds occur, and occur together, in the scenes a model has learnt from."""

    def __init__(self, scenes: Iterable[Scene]) -> None:
        self._single: Counter[Kind] = Counter()
        self._pairs: Counter[tuple[Kind, Kind]] = Counter()
        for scene in scenes:
            self._single.update(scene.kinds)
            self._pairs.update((a, b) for a in scene.kinds for b in scene.kinds if a != b)

    def absent(
        self, scene: Scene, category: str, count: int, rng: np.random.Generator
    ) -> list[Kind]:
        """`count` kinds that are not in the scene.

        `random` ones are any, `popular` ones are drawn from the most frequent, `adversarial` ones
        are those that most often come with what is there.
        """
        absent = [kind for kind in KINDS if kind not in scene.kinds]
        if category == "adversarial":
            return sorted(absent, key=lambda kind: -self._expected(kind, scene))[:count]
        if category == "popular":
            absent = sorted(absent, key=lambda kind: -self._single[kind])[:_POPULAR]
        return [absent[index] for index in rng.choice(len(absent), size=count, replace=False)]

    def _expected(self, kind: Kind, scene: Scene) -> float:
        """The highest share of scenes with something that is there that have `kind`, too."""
        return max(self._pairs[other, kind] / max(self._single[other], 1) for other in scene.kinds)


@dataclass(frozen=True, slots=True)
class Share:
    """A figure as a sum over a sum, by scene, so that scenes can be drawn again.

    Attributes:
        parts: what counts, of each scene.
        wholes: what it is counted among, of each scene.
    """

    parts: tuple[float, ...]
    wholes: tuple[float, ...]

    @property
    def value(self) -> float:
        """The figure; 0 where nothing was counted."""
        return sum(self.parts) / (sum(self.wholes) or 1)


def caption_shares(captions: Sequence[str], scenes: Sequence[Scene]) -> dict[str, Share]:
    """Figures of captions, after CHAIR (Rohrbach et al., 2018).

    `chair_s` is the share of captions that name something absent, `chair_i` the share of what is
    named that is absent, `recall` the share of what is there that is named.
    """
    said = [mentioned(caption) for caption in captions]
    pairs = list(zip(said, (scene.kinds for scene in scenes), strict=True))
    false = [len(named - there) for named, there in pairs]
    return {
        "chair_s": _share((bool(wrong) for wrong in false), [1] * len(pairs)),
        "chair_i": _share(false, (len(named) for named, _ in pairs)),
        "recall": _share(
            (len(named & there) for named, there in pairs), (len(there) for _, there in pairs)
        ),
    }


@dataclass(frozen=True, slots=True)
class Judged:
    """A yes/no question with the answer given, and the scene it belongs to."""

    scene: int
    wanted: bool
    given: bool | None


def question_shares(judged: Sequence[Judged], scenes: int) -> dict[str, Share]:
    """Figures of yes/no questions, after POPE (Li et al., 2023).

    An answer that is neither yes nor no is wrong, and `valid` tells how many are one of both.
    """
    tallies = np.zeros((scenes, 6))
    for one in judged:
        hit = one.wanted and one.given is True
        missed = one.wanted and not hit
        false = not one.wanted and one.given is True
        right = one.given is one.wanted
        tallies[one.scene] += (
            1,
            right,
            hit,
            missed + false,
            one.given is True,
            one.given is not None,
        )
    asked, right, hits, wrong, yes, clear = tallies.T
    return {
        "accuracy": _share(right, asked),
        "f1": _share(2 * hits, 2 * hits + wrong),
        "yes": _share(yes, asked),
        "valid": _share(clear, asked),
    }


def exact_share(given: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]) -> Share:
    """Share of answers that are word for word the wanted one; by scene."""
    pairs = [list(zip(a, b, strict=True)) for a, b in zip(given, wanted, strict=True)]
    return _share(
        (sum(_plain(a) == _plain(b) for a, b in scene) for scene in pairs),
        (len(scene) for scene in pairs),
    )


def _plain(text: str) -> str:
    return text.strip().rstrip(".").lower()


def _share(parts: Iterable[float], wholes: Iterable[float]) -> Share:
    return Share(tuple(map(float, parts)), tuple(map(float, wholes)))


def named(shares: Mapping[str, Share], prefix: str) -> dict[str, Share]:
    """The same figures under `prefix.name`."""
    return {f"{prefix}.{name}": share for name, share in shares.items()}
