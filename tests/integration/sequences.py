"""Real text as token ids, and the log-probabilities of a whole sequence in an answer."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer


class Text:
    """Stretches of real text as token ids. Random ids make a model chaotic: an eager forward in
    float32 is then up to 8e-4 off one in float64, before anything is calibrated."""

    def __init__(self, folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        licence = Path(__file__).parents[2] / "LICENSE"
        self.tokens: list[int] = tokenizer(licence.read_text())["input_ids"]

    def prompt(self, draw: random.Random, length: int) -> list[int]:
        """`length` successive tokens from a random place."""
        start = draw.randrange(len(self.tokens) - length)
        return self.tokens[start : start + length]


def log_probabilities(answer: Any, tokens: list[int]) -> tuple[list[int], torch.Tensor]:
    """All tokens of an answer, and the log-probability of each after the first."""
    choice = answer["choices"][0]
    generated = choice["token_ids"]
    given = [
        entry[str(token)]["logprob"]
        for token, entry in zip(tokens[1:], choice["prompt_logprobs"][1:], strict=True)
    ]
    return [*tokens, *generated], torch.tensor([*given, *choice["logprobs"]["token_logprobs"]])
