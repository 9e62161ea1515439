"""Answers of a checkpoint through transformers, without a server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

MAX_TOKENS = 48
_BATCH = 64


class Model:
    """A checkpoint in float32.

    Args:
        folder: that of the checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.processor = AutoProcessor.from_pretrained(folder)
        self.network = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)

    def answers(self, pictures: Sequence[Image.Image], questions: Sequence[str]) -> list[str]:
        """The greedy answer to each question about its picture."""
        texts = [self.prompt(question) for question in questions]
        return [text for batch in self._batches(pictures, texts) for text in batch]

    def prompt(self, question: str) -> str:
        """The question about one picture, through the chat template."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(messages, add_generation_prompt=True)

    @torch.inference_mode()
    def _batches(self, pictures: Sequence[Image.Image], texts: list[str]) -> Iterator[list[str]]:
        for start in range(0, len(texts), _BATCH):
            inputs = self.processor(
                images=list(pictures[start : start + _BATCH]),
                text=texts[start : start + _BATCH],
                add_special_tokens=False,  # the template has them
                padding=True,
                return_tensors="pt",
            )
            made = self.network.generate(**inputs, max_new_tokens=MAX_TOKENS)
            answers = made[:, inputs["input_ids"].shape[1] :]
            yield [
                a.strip() for a in self.processor.batch_decode(answers, skip_special_tokens=True)
            ]
