"""What papers and replications give for the models they used, and which model is one of those.

A checkpoint's name says little about what is in it, so a model is known by its shape. Key/value
heads are part of it: they tell LLaMA-2 from the Llama 3, Mistral and Pixtral models of the same
depth and width, whose sinks are in other channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from calibrators.interface import ModelFacts

Shape: TypeAlias = tuple[str, int, int, int]
"""Architecture, layers, hidden size, key/value heads."""

DEPTH_SCALED = "depth-scaled"
"""What a receipt calls layers that were derived from the depth of a model nobody has published."""


@dataclass(frozen=True, slots=True)
class Enhancement:
    """GIFT's parameters for a model.

    Attributes:
        saliency_layer: where the saliency map is taken.
        layers: where it is used, ascending.
        alpha: strength of the map.
    """

    saliency_layer: int
    layers: tuple[int, ...]
    alpha: float


@dataclass(frozen=True, slots=True)
class Published:
    """What is known of a model, None where nothing is.

    Attributes:
        sink_dims: channels of the residual stream that stand out at sink tokens, ascending
            (arXiv 2503.03321, and replications for models that are not in it).
        enhancement: of GIFT (arXiv 2510.22067).
        vision_layers: layers that VHR reinforces, ascending (arXiv 2412.13949).
    """

    sink_dims: tuple[int, ...] | None = None
    enhancement: Enhancement | None = None
    vision_layers: tuple[int, ...] | None = None


_LLAVA = "LlavaForConditionalGeneration"
_QWEN2 = "Qwen2VLForConditionalGeneration"
_QWEN2_5 = "Qwen2_5_VLForConditionalGeneration"

MODELS: Mapping[Shape, Published] = {
    # LLaVA-1.5-7B
    (_LLAVA, 32, 4096, 32): Published(
        (1415, 2533), Enhancement(11, tuple(range(12, 23)), 5.0), (1, *range(18, 32))
    ),
    # LLaVA-1.5-13B
    (_LLAVA, 40, 5120, 40): Published((2100, 4743), Enhancement(10, tuple(range(14, 21)), 5.0)),
    # Qwen2-VL-7B
    (_QWEN2, 28, 3584, 4): Published((458, 2570), Enhancement(14, tuple(range(5, 19)), 4.0)),
    # Qwen2.5-VL-7B
    (_QWEN2_5, 28, 3584, 4): Published((458, 2570)),
    # Qwen2-VL-2B and InternVL2-8B: a single source each
    (_QWEN2, 28, 1536, 2): Published((534, 940, 1073)),
    ("InternVLChatModel", 32, 4096, 8): Published((3584,)),
}


def published(facts: ModelFacts) -> Published:
    """What is known of a model; nothing for one that is not in `MODELS`."""
    shape = facts.architecture, facts.layers, facts.hidden_size, facts.kv_heads
    return MODELS.get(shape, Published())
