"""Writes a checkpoint under the tensor names of LLaVA-1.5, which every loader knows."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration, LlavaProcessor

WEIGHTS = "model.safetensors"


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Write model and processor, weights rounded to bfloat16; `model` stays as it is."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    rename(folder / WEIGHTS)


def rename(weights: Path) -> None:
    """Give the tensors of the vision tower their old names.

    transformers 5 drops a part of them, which vLLM's LLaVA then misses.
    """
    tensors = {old_name(name): tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})


def old_name(name: str) -> str:
    """The name of a tensor in LLaVA-1.5."""
    new, old = "vision_tower.", "vision_tower.vision_model."
    return name if name.startswith(old) else name.replace(new, old, 1)
