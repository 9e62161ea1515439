"""The questions of an examination about objects, and how answers to them are judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from benchmarks.objects import (
    CATEGORIES,
    Judged,
    Occurrences,
    Share,
    caption_shares,
    exact_share,
    named,
    question_shares,
    yes_or_no,
)
from examples.shapes_llava.questions import DESCRIBE, presence, turns
from examples.shapes_llava.scenes import Scene, draw, scenes

# Scenes like those of the training, for what occurs with what.
_COUNTED = 2000
# Yes/no questions of each category about a scene, half of them about what is there, at most.
_PAIRS = 3
# Questions of every kind about a usual scene, its caption beside them.
_MIXED = 6


@dataclass(frozen=True, slots=True)
class Asked:
    """One question.

    Attributes:
        picture: what is shown.
        text: the question.
        scene: index of the scene in its set.
        part: which figures the answer is for: `usual` (any question), `usual.caption`,
            `broken.caption`, `present`, or a category of what is absent.
        wanted: the true answer; empty for captions.
    """

    picture: Image.Image
    text: str
    scene: int
    part: str
    wanted: str = ""


@dataclass(frozen=True, slots=True)
class Examination:
    """Scenes of both sets and everything asked about them."""

    usual: tuple[Scene, ...]
    broken: tuple[Scene, ...]
    questions: tuple[Asked, ...]


def prepare(count: int, seed: int) -> Examination:
    """The examination on `count` scenes of each set; the same for the same seed."""
    usual = tuple(scenes(seed, count))
    broken = tuple(scenes(seed + 1, count, broken=True))
    rng = np.random.default_rng(seed + 2)
    occurrences = Occurrences(scenes(seed + 3, _COUNTED))
    questions = [_mixed(scene, index, rng) for index, scene in enumerate(usual)]
    questions += [_polled(scene, index, occurrences, rng) for index, scene in enumerate(broken)]
    return Examination(usual, broken, tuple(one for about in questions for one in about))


def _mixed(scene: Scene, index: int, rng: np.random.Generator) -> list[Asked]:
    picture = draw(scene)
    asked = turns(scene, rng, _MIXED)
    # The caption among them is judged by the objects it names, not by its order.
    plain = [turn for turn in asked if not turn.answer.startswith("There is")]
    return [
        Asked(picture, DESCRIBE, index, "usual.caption"),
        *(Asked(picture, turn.question, index, "usual", turn.answer) for turn in plain),
    ]


def _polled(
    scene: Scene, index: int, occurrences: Occurrences, rng: np.random.Generator
) -> list[Asked]:
    picture = draw(scene)
    pairs = min(_PAIRS, len(scene.things))
    there = [thing.kind for thing in scene.things[:pairs]]
    return [
        Asked(picture, DESCRIBE, index, "broken.caption"),
        *(Asked(picture, presence(kind), index, "present", "Yes") for kind in there),
        *(
            Asked(picture, presence(kind), index, category, "No")
            for category in CATEGORIES
            for kind in occurrences.absent(scene, category, pairs, rng)
        ),
    ]


def examine(examination: Examination, answers: Sequence[str]) -> dict[str, Share]:
    """The figures of the answers, in the order of the questions."""
    pairs = list(zip(examination.questions, answers, strict=True))
    shares = {"usual.exact": _exact(examination, pairs)}
    for name, about in (("usual", examination.usual), ("broken", examination.broken)):
        captions = [answer for asked, answer in pairs if asked.part == f"{name}.caption"]
        shares |= named(caption_shares(captions, about), name)
    for category in CATEGORIES:
        # What is there is asked once, and counts beside what is absent in each category.
        judged = [
            Judged(asked.scene, asked.wanted == "Yes", yes_or_no(answer))
            for asked, answer in pairs
            if asked.part in ("present", category)
        ]
        shares |= named(question_shares(judged, len(examination.broken)), category)
    return shares


def _exact(examination: Examination, pairs: Sequence[tuple[Asked, str]]) -> Share:
    count = len(examination.usual)
    given: list[list[str]] = [[] for _ in range(count)]
    wanted: list[list[str]] = [[] for _ in range(count)]
    for asked, answer in pairs:
        if asked.part == "usual":
            given[asked.scene].append(answer)
            wanted[asked.scene].append(asked.wanted)
    return exact_share(given, wanted)
