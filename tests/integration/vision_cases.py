"""Settings of the vision methods, and conversations for them, of which the tests know all."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tests.fixtures.llava import IMAGE_SIZE, PATCH
from tests.integration.sighted import Look

NEW_TOKENS = 12
VAR: list[dict[str, Any]] = [
    {},
    {"tau": 12.0, "rho": 0.9},
    {"share": 1.0, "rho": 0.0, "min_visual_mass": 0.0, "layers": "all"},
    {"layers": [1, 3], "sink_dims": [7]},
    {"share": 0.0},
    {"sink_dims": [300]},
]
GIFT: list[dict[str, Any]] = [
    {},
    {"alpha": 0.0},
    {"alpha": 10.0, "beta": 2.0, "saliency_layer": 4, "layers": [0, 1, 2]},
    {"saliency_layer": 0, "layers": "all", "alpha": 2.0},
    {"alpha": 3.0, "beta": 0.0},
]
VHR: list[dict[str, Any]] = [
    {},
    {"alpha": 0.0, "layers": [2]},
    {"alpha": 1.0},
    {"rows": "last"},
    {"alpha": 1.5, "layers": "all"},
    {"alpha": 1.5, "layers": [1, 2], "rows": "last"},
]


def picture(seed: int, bright: int) -> Image.Image:
    """Dark noise with so many bright patches."""
    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 110, (IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.uint8)
    places = draw.choice((IMAGE_SIZE // PATCH) ** 2, bright, replace=False)
    for row, column in (divmod(int(place), IMAGE_SIZE // PATCH) for place in places):
        patch = draw.integers(200, 256, (PATCH, PATCH, 3))
        pixels[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] = patch
    return Image.fromarray(pixels)


def data_url(image: Image.Image, form: str = "PNG") -> str:
    """The image as a client sends it."""
    file = io.BytesIO()
    image.save(file, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


@dataclass(frozen=True)
class Conversation:
    """Turns of a conversation, each with images and a text; the user's and the model's in turn.

    Attributes:
        turns: pictures and text of each.
        content: the content words of the last text, in order.
    """

    turns: tuple[tuple[tuple[Image.Image, ...], str], ...]
    content: tuple[str, ...] = ()

    @property
    def images(self) -> list[Image.Image]:
        """All pictures, in order."""
        return [image for images, _ in self.turns for image in images]

    @cached_property
    def messages(self) -> list[dict[str, Any]]:
        """As a client sends them."""
        return [
            {
                "role": "assistant" if index % 2 else "user",
                "content": [
                    *({"type": "image_url", "image_url": {"url": data_url(i)}} for i in images),
                    {"type": "text", "text": text},
                ],
            }
            for index, (images, text) in enumerate(self.turns)
        ]

    def look(self, tokenizer: Any, image: int, prompt: list[int], tokens: list[int]) -> Look:
        """Where things are, told by decoding token after token."""
        of_image = torch.tensor([token == image for token in tokens])
        place, spans = 0, []
        for token in prompt:
            size = 0 if token == image else len(tokenizer.decode([token]))
            spans.append((place, place + size))
            place += size
        text = "".join(tokenizer.decode([token]) for token in prompt if token != image)
        question = self.turns[-1][1]
        start = text.rindex(question)
        query = _overlapping(spans, start, start + len(question), len(tokens))
        rows: set[int] = set()
        at = start
        for word in self.content:
            at = text.index(word, at)
            rows |= set(
                _overlapping(spans, at, at + len(word), len(tokens)).nonzero()[:, 0].tolist()
            )
            at += len(word)
        return Look(len(prompt), tokens, of_image, query, sorted(rows), len(self.content))


def _overlapping(spans: list[tuple[int, int]], start: int, stop: int, length: int) -> Tensor:
    inside = [a < stop and b > start for a, b in spans]
    return torch.tensor(inside + [False] * (length - len(inside)))


SHORT = Conversation(
    (((picture(1, 4),), "What does the licensor grant. Who may use the work?"),),
    ("licensor", "grant", "use", "work"),
)
LONG = Conversation(
    (
        (
            (picture(2, 3),),
            "The contributor shall be named here. What is the work of this licence?",
        ),
        ((), "A work of authorship. It is made available under the licence, as the notice says."),
        (
            (picture(3, 5), picture(4, 1)),
            "Compare the notice with the terms. Which patent applies, and where is the copy?",
        ),
    ),
    ("Compare", "notice", "terms", "patent", "applies", "copy"),
)
DARK = Conversation(
    (((picture(5, 0),), "Is there any trademark in it?"),),
    ("trademark",),
)
NO_CONTENT = Conversation((((picture(6, 2),), "Who is it?"),), ())
