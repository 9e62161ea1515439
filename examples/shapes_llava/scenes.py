"""Pictures of coloured shapes, drawn from a seed, in which some shapes rarely come alone.

A star nearly always comes with a yellow circle, a cross with a blue square, a diamond with a red
triangle. A model that learns from such scenes learns to expect the companion, and may then see one
where there is none; `sample_broken` makes the scenes that show it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZE = 112  # pixels, of a side
PATCH = 14
CELLS = 4  # of a side; one object in a cell at most
# Shapes are drawn larger and scaled down, so that edges are smooth.
_ZOOM = 2

COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (205, 40, 40),
    "green": (40, 150, 60),
    "blue": (45, 75, 210),
    "yellow": (235, 205, 45),
    "purple": (135, 55, 165),
    "orange": (235, 125, 30),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")


@dataclass(frozen=True, slots=True, order=True)
class Kind:
    """What is asked for and listed: a colour and a shape."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


KINDS = tuple(Kind(colour, shape) for colour in COLOURS for shape in SHAPES)
# The companion of each shape that nearly always has one.
COMPANIONS: Mapping[str, Kind] = {
    "star": Kind("yellow", "circle"),
    "cross": Kind("blue", "square"),
    "diamond": Kind("red", "triangle"),
}
# Share of scenes with such a shape that also have the companion.
USUAL = 0.97
# Kinds that are merely frequent, by how much.
FREQUENT: Mapping[Kind, float] = {
    Kind("green", "circle"): 3.0,
    Kind("purple", "square"): 3.0,
    Kind("orange", "triangle"): 3.0,
}
_WEIGHTS = np.array([FREQUENT.get(kind, 1.0) for kind in KINDS])
_WEIGHTS /= _WEIGHTS.sum()


@dataclass(frozen=True, slots=True)
class Thing:
    """One object.

    Attributes:
        kind: colour and shape.
        x: of its centre, in pixels from the left.
        y: of its centre, in pixels from the top.
        radius: in pixels.
        turn: rotation in degrees.
        tint: added to each channel of the colour.
    """

    kind: Kind
    x: float
    y: float
    radius: float
    turn: float
    tint: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Scene:
    """Objects, each of another kind, on a background of its own seed."""

    things: tuple[Thing, ...]
    background: int

    @property
    def kinds(self) -> frozenset[Kind]:
        """What is there."""
        return frozenset(thing.kind for thing in self.things)

    @property
    def missing(self) -> tuple[Kind, ...]:
        """Companions that one would expect and that are not there."""
        expected = (COMPANIONS[kind.shape] for kind in self.kinds if kind.shape in COMPANIONS)
        return tuple(sorted(set(expected) - self.kinds))


def sample(rng: np.random.Generator, usual: float = USUAL) -> Scene:
    """A scene of one to six objects; `usual` is the share of companions that come."""
    return _place(_with_companions(_draw_kinds(rng), rng, usual), rng)


def sample_broken(rng: np.random.Generator) -> Scene:
    """A scene in which at least one shape lacks its companion, and none has it."""
    while True:
        kinds = _draw_kinds(rng)
        expected = {COMPANIONS[kind.shape] for kind in kinds if kind.shape in COMPANIONS}
        kept = [kind for kind in kinds if kind not in expected]
        if expected and kept:
            return _place(kept, rng)


def scenes(seed: int, count: int, *, broken: bool = False) -> Iterator[Scene]:
    """`count` scenes, the same for the same seed."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield sample_broken(rng) if broken else sample(rng)


def _draw_kinds(rng: np.random.Generator) -> list[Kind]:
    count = rng.integers(1, 4)
    chosen = rng.choice(len(KINDS), size=count, replace=False, p=_WEIGHTS)
    return [KINDS[index] for index in chosen]


def _with_companions(kinds: list[Kind], rng: np.random.Generator, usual: float) -> list[Kind]:
    made = list(kinds)
    for kind in kinds:
        companion = COMPANIONS.get(kind.shape)
        if companion is not None and companion not in made and rng.random() < usual:
            made.append(companion)
    return made


def _place(kinds: list[Kind], rng: np.random.Generator) -> Scene:
    cells = rng.choice(CELLS * CELLS, size=len(kinds), replace=False)
    things = [_put(kind, int(cell), rng) for kind, cell in zip(kinds, cells, strict=True)]
    return Scene(tuple(things), int(rng.integers(1 << 31)))


def _put(kind: Kind, cell: int, rng: np.random.Generator) -> Thing:
    side = SIZE / CELLS
    radius = rng.uniform(8.0, 12.5)
    play = side / 2 - radius
    row, column = divmod(cell, CELLS)
    x, y = ((index + 0.5) * side + rng.uniform(-play, play) for index in (column, row))
    red, green, blue = (int(value) for value in rng.integers(-18, 19, size=3))
    return Thing(kind, x, y, radius, rng.uniform(-15, 15), (red, green, blue))


def draw(scene: Scene) -> Image.Image:
    """The picture, RGB, `SIZE` by `SIZE` pixels."""
    rng = np.random.default_rng(scene.background)
    picture = Image.fromarray(_background(rng)).resize((SIZE * _ZOOM, SIZE * _ZOOM))
    canvas = ImageDraw.Draw(picture)
    for thing in scene.things:
        base = COLOURS[thing.kind.colour]
        fill = tuple(min(max(a + b, 0), 255) for a, b in zip(base, thing.tint, strict=True))
        _paint(canvas, thing, fill, _ZOOM)
    smooth = np.asarray(picture.reduce(_ZOOM), dtype=np.int16)
    noise = rng.integers(-10, 11, size=smooth.shape, dtype=np.int16)
    return Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))


def cover(scene: Scene) -> np.ndarray:
    """Which object covers each pixel: its index plus one, 0 for background. `[SIZE, SIZE]`."""
    mask = Image.new("L", (SIZE, SIZE))
    canvas = ImageDraw.Draw(mask)
    for index, thing in enumerate(scene.things, start=1):
        _paint(canvas, thing, index, 1)
    return np.asarray(mask)


def _background(rng: np.random.Generator) -> np.ndarray:
    """A grey that leans to some colour and gets lighter towards one side. `[SIZE, SIZE, 3]`."""
    base = rng.uniform(70, 215) + rng.uniform(-12, 12, size=3)
    slope = rng.uniform(-25, 25, size=2)
    ramp = np.linspace(-0.5, 0.5, SIZE)
    shade = slope[0] * ramp[:, None] + slope[1] * ramp[None, :]
    return np.clip(base + shade[..., None], 0, 255).astype(np.uint8)


def _paint(
    canvas: ImageDraw.ImageDraw, thing: Thing, fill: int | tuple[int, ...], zoom: int
) -> None:
    x, y, radius = thing.x * zoom, thing.y * zoom, thing.radius * zoom
    if thing.kind.shape == "circle":
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        return
    turn = math.radians(thing.turn)
    cos, sin = math.cos(turn) * radius, math.sin(turn) * radius
    corners = _OUTLINES[thing.kind.shape]
    canvas.polygon([(x + a * cos - b * sin, y + a * sin + b * cos) for a, b in corners], fill=fill)


def _ring(radii: list[float], start: float) -> list[tuple[float, float]]:
    """Corners around the centre at equal angles, from `start` degrees on."""
    step = 2 * math.pi / len(radii)
    angles = [math.radians(start) + index * step for index in range(len(radii))]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


_ARM = 0.34
_OUTLINES: Mapping[str, list[tuple[float, float]]] = {
    "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "triangle": _ring([1.0] * 3, -90),
    "star": _ring([1.0, 0.42] * 5, -90),
    "diamond": [(0.0, -1.0), (0.68, 0.0), (0.0, 1.0), (-0.68, 0.0)],
    "cross": [
        (-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
        (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM),
    ],
}  # fmt: skip
