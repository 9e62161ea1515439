"""Batches to learn from: pictures with what covers their patches, and packed conversations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from transformers import LlavaProcessor, PreTrainedTokenizerFast

from examples.shapes_llava.questions import turns
from examples.shapes_llava.scenes import COLOURS, PATCH, SHAPES, SIZE, Scene, cover, draw, sample
from examples.shapes_llava.tokens import prefix, question_text

_GRID = SIZE // PATCH
# A patch belongs to an object that covers this share of it.
_COVERED = 0.15
# Share of conversations whose turns see each other; in the others each is asked by itself.
_CONNECTED = 0.2


@dataclass(frozen=True, slots=True)
class Conversations:
    """Packed questions about pictures.

    Attributes:
        pixels: `[batch, 3, SIZE, SIZE]`.
        tokens: `[batch, length]`.
        positions: `[batch, length]`; those of questions asked by themselves all start alike.
        visible: which keys a row sees, `[batch, 1, length, length]`.
        targets: the next token where it belongs to an answer, else -100; `[batch, length]`.
    """

    pixels: torch.Tensor
    tokens: torch.Tensor
    positions: torch.Tensor
    visible: torch.Tensor
    targets: torch.Tensor


class Source:
    """Endless batches of fresh scenes.

    Args:
        processor: of the model.
        seed: of scenes, questions and their order.
        usual: share of companions that come.
    """

    def __init__(self, processor: LlavaProcessor, seed: int, usual: float) -> None:
        self._rng = np.random.default_rng(seed)
        self._usual = usual
        pictures = processor.image_processor
        self._mean, self._std = (
            np.float32(x[0]) for x in (pictures.image_mean, pictures.image_std)
        )
        self._pad = processor.tokenizer.pad_token_id
        self._encode = _encoder(processor.tokenizer)

    def patches(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pictures with the colour and shape on each patch, `[count, patches]`, 0 for none."""
        scenes = self._scenes(count)
        labels = torch.from_numpy(np.stack([_labels(scene) for scene in scenes]))
        return self._pixels(scenes), labels[:, 0], labels[:, 1]

    def conversations(self, count: int, questions: int) -> Conversations:
        """Packed conversations of `questions` turns and a caption each."""
        scenes = self._scenes(count)
        rows = [self._row(scene, questions) for scene in scenes]
        length = max(len(row.tokens) for row in rows)
        tokens = np.full((count, length), self._pad)
        targets = np.full((count, length), -100)
        positions = np.zeros((count, length), dtype=np.int64)
        # A row of padding sees itself, or its softmax would be of nothing.
        visible = np.broadcast_to(np.eye(length, dtype=bool), (count, length, length)).copy()
        for index, row in enumerate(rows):
            size = len(row.tokens)
            tokens[index, :size], targets[index, :size] = row.tokens, row.targets
            positions[index, :size] = row.positions
            seen = (row.groups[None, :] == 0) | (row.groups[None, :] == row.groups[:, None])
            visible[index, :size, :size] = np.tril(seen)
        arrays = (tokens, positions, visible[:, None], targets)
        return Conversations(self._pixels(scenes), *(torch.from_numpy(array) for array in arrays))

    def _scenes(self, count: int) -> list[Scene]:
        return [sample(self._rng, self._usual) for _ in range(count)]

    def _pixels(self, scenes: list[Scene]) -> torch.Tensor:
        pixels = np.stack([np.asarray(draw(scene)) for scene in scenes]).astype(np.float32) / 255
        return torch.from_numpy((pixels - self._mean) / self._std).permute(0, 3, 1, 2).contiguous()

    def _row(self, scene: Scene, questions: int) -> _Row:
        start = self._encode(prefix(), True)
        connected = bool(self._rng.random() < _CONNECTED)
        row = _Row()
        row.add(start, 0, group=0, position=0)
        for index, turn in enumerate(turns(scene, self._rng, questions)):
            asked = self._encode(question_text(turn.question, not connected or index == 0), False)
            answer = self._encode(f" {turn.answer}</s>", False)
            position = len(row.tokens) if connected else len(start)
            row.add(asked + answer, len(answer), 0 if connected else index + 1, position)
        return row


class _Row:
    """One conversation while it is put together."""

    def __init__(self) -> None:
        self.tokens = np.zeros(0, dtype=np.int64)
        self.targets = np.zeros(0, dtype=np.int64)
        self.positions = np.zeros(0, dtype=np.int64)
        self.groups = np.zeros(0, dtype=np.int64)

    def add(self, tokens: tuple[int, ...], answer: int, group: int, position: int) -> None:
        """Append tokens of which the last `answer` are to be learnt."""
        size = len(tokens)
        targets = np.full(size, -100)
        if answer:
            targets[-answer - 1 : -1] = tokens[-answer:]
        self.tokens = np.append(self.tokens, tokens)
        self.targets = np.append(self.targets, targets)
        self.positions = np.append(self.positions, np.arange(position, position + size))
        self.groups = np.append(self.groups, np.full(size, group))


def _encoder(tokenizer: PreTrainedTokenizerFast) -> Callable[[str, bool], tuple[int, ...]]:
    @cache
    def encode(text: str, special: bool) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=special)["input_ids"])

    return encode


def _labels(scene: Scene) -> np.ndarray:
    """Colour and shape per patch, plus one, `[2, patches]`."""
    mask = cover(scene).reshape(_GRID, PATCH, _GRID, PATCH)
    labels = np.zeros((2, _GRID, _GRID), dtype=np.int64)
    most = np.full((_GRID, _GRID), _COVERED)
    for index, thing in enumerate(scene.things, start=1):
        share = (mask == index).mean(axis=(1, 3))
        won = share > most
        most[won] = share[won]
        labels[0, won] = 1 + list(COLOURS).index(thing.kind.colour)
        labels[1, won] = 1 + SHAPES.index(thing.kind.shape)
    return labels.reshape(2, -1)
