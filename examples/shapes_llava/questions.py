"""What is asked about a scene, and the true answers, from which the model learns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from examples.shapes_llava.scenes import (
    COLOURS,
    COMPANIONS,
    KINDS,
    SHAPES,
    SIZE,
    Kind,
    Scene,
    Thing,
)

T = TypeVar("T")

DESCRIBE = "Describe the image."
_DESCRIBE = (DESCRIBE, "What is in the image?", "What do you see?", "Describe this picture.")
_PRESENT = (
    "Is there {} in the image?",
    "Is there {} in the picture?",
    "Is there {}?",
    "Can you see {}?",
)


@dataclass(frozen=True, slots=True)
class Turn:
    """One question with its answer."""

    question: str
    answer: str


def with_article(kind: Kind) -> str:
    """`a red circle`, `an orange circle`."""
    return f"{'an' if kind.colour[0] in 'aeiou' else 'a'} {kind}"


def presence(kind: Kind, form: int = 0) -> str:
    """The question whether a kind is there."""
    return _PRESENT[form].format(with_article(kind))


def caption(scene: Scene) -> str:
    """A sentence that lists the objects row by row, companions right after what they belong to."""
    listed = [with_article(thing.kind) for thing in _told(scene.things)]
    return f"There is {', '.join(listed[:-1])}{' and ' if listed[1:] else ''}{listed[-1]}."


def _told(things: Sequence[Thing]) -> list[Thing]:
    left = sorted(things, key=lambda thing: (_cell(thing.y), _cell(thing.x)))
    kinds = {thing.kind for thing in things}
    companions = {COMPANIONS.get(kind.shape) for kind in kinds} & kinds
    order: list[Thing] = []
    for thing in [thing for thing in left if thing.kind not in companions]:
        order.append(thing)
        expected = COMPANIONS.get(thing.kind.shape)
        order += [one for one in left if one.kind == expected and one not in order]
    return order


def _cell(pixels: float) -> int:
    return int(pixels // (SIZE / 4))


def turns(scene: Scene, rng: np.random.Generator, count: int = 8) -> list[Turn]:
    """A caption and `count` questions with their answers, in random order."""
    describe = Turn(_pick(_DESCRIBE, rng), caption(scene))
    asked = {describe.question: describe}
    while len(asked) <= count:
        turn = _QUESTIONS[rng.choice(len(_QUESTIONS), p=_SHARES)](scene, rng)
        if turn is not None:
            asked.setdefault(turn.question, turn)
    made = list(asked.values())
    return [made[index] for index in rng.permutation(len(made))]


def _ask_presence(scene: Scene, rng: np.random.Generator) -> Turn:
    present = bool(rng.random() < 0.5)
    kind = _pick(sorted(scene.kinds), rng) if present else _absent(scene, rng)
    return Turn(presence(kind, int(rng.integers(len(_PRESENT)))), "Yes" if present else "No")


def _absent(scene: Scene, rng: np.random.Generator) -> Kind:
    """Any kind that is not there; half of the time one that shares colour or shape with another."""
    absent = [kind for kind in KINDS if kind not in scene.kinds]
    if rng.random() < 0.5:
        colours = {kind.colour for kind in scene.kinds}
        shapes = {kind.shape for kind in scene.kinds}
        absent = [kind for kind in absent if kind.colour in colours or kind.shape in shapes]
    return _pick(absent, rng)


def _ask_count(scene: Scene, rng: np.random.Generator) -> Turn:
    if rng.random() < 0.4:
        return Turn("How many objects are there?", str(len(scene.things)))
    shape = _pick(SHAPES, rng)
    number = sum(kind.shape == shape for kind in scene.kinds)
    return Turn(f"How many {_plural(shape)} are there?", str(number))


def _ask_count_of_colour(scene: Scene, rng: np.random.Generator) -> Turn:
    colour = _pick(list(COLOURS), rng)
    number = sum(kind.colour == colour for kind in scene.kinds)
    return Turn(f"How many {colour} objects are there?", str(number))


def _ask_colour(scene: Scene, rng: np.random.Generator) -> Turn | None:
    kind = _pick(sorted(scene.kinds), rng)
    if sum(other.shape == kind.shape for other in scene.kinds) > 1:
        return None
    return Turn(f"What colour is the {kind.shape}?", kind.colour.capitalize())


def _ask_shape(scene: Scene, rng: np.random.Generator) -> Turn | None:
    kind = _pick(sorted(scene.kinds), rng)
    if sum(other.colour == kind.colour for other in scene.kinds) > 1:
        return None
    return Turn(f"What shape is the {kind.colour} object?", kind.shape.capitalize())


def _ask_position(scene: Scene, rng: np.random.Generator) -> Turn:
    thing = _pick(scene.things, rng)
    row = "Top" if thing.y < SIZE / 2 else "Bottom"
    column = "left" if thing.x < SIZE / 2 else "right"
    return Turn(f"Where is the {thing.kind}?", f"{row} {column}")


def _plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _pick(values: Sequence[T], rng: np.random.Generator) -> T:
    return values[int(rng.integers(len(values)))]


_QUESTIONS: tuple[Callable[[Scene, np.random.Generator], Turn | None], ...] = (
    _ask_presence,
    _ask_count,
    _ask_count_of_colour,
    _ask_colour,
    _ask_shape,
    _ask_position,
)
_SHARES = (0.5, 0.08, 0.07, 0.12, 0.12, 0.11)
