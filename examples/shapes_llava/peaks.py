"""Looks for channels of the residual stream that are far above the others, which VAR calls sinks.

    python -m examples.shapes_llava.peaks server/embedded/shapes_llava --channels 19 44

A line for each decoder layer: the channels that are largest at the first token, relative to the
root mean square of what enters the layer there; the share of image tokens and of other tokens
beyond the threshold in these channels, or in those that are named; and the mean attention that the
first token gets.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from examples.shapes_llava.ask import Model
from examples.shapes_llava.questions import DESCRIBE
from examples.shapes_llava.scenes import draw, scenes

CHANNELS = 2


@dataclass(frozen=True, slots=True)
class Layer:
    """What enters a layer and where its rows look.

    Attributes:
        ratios: |x| over the root mean square, `[pictures, tokens, channels]`.
        first: mean attention of image and of text rows on the first token.
        image: mean attention of text rows after the image on all of it.
    """

    ratios: torch.Tensor
    first: tuple[float, float]
    image: float


def main(argv: Sequence[str] | None = None) -> int:
    """Print the lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the checkpoint")
    parser.add_argument("--threshold", type=float, default=5.0)
    parser.add_argument("--channels", type=int, nargs="+", help="in place of the largest")
    parser.add_argument("--scenes", type=int, default=32)
    args = parser.parse_args(argv)
    is_image, layers = look(Model(args.folder), args.scenes)
    for index, layer in enumerate(layers):
        sys.stdout.write(f"{index}: {line(layer, is_image, args.threshold, args.channels)}\n")
    return 0


def line(
    layer: Layer, is_image: torch.Tensor, threshold: float, named: Sequence[int] | None = None
) -> str:
    """One layer in words."""
    mean = layer.ratios.mean(dim=0)
    channels = mean[0].topk(CHANNELS).indices
    height = ", ".join(f"{int(c)} at {mean[0, c]:.1f}" for c in channels)
    phi = layer.ratios[..., list(named or channels)].max(dim=-1).values
    beyond = phi > threshold
    text = beyond[:, ~is_image][:, 1:].float().mean()
    largest = Counter(layer.ratios.argmax(dim=-1).flatten().tolist()).most_common(CHANNELS)
    return (
        f"first token: channels {height}; beyond {threshold:g}: "
        f"image tokens {beyond[:, is_image].float().mean():.1%}, other text {text:.1%}; "
        f"most often largest: {', '.join(str(channel) for channel, _ in largest)}; "
        f"attention on the first token from image {layer.first[0]:.2f}, text {layer.first[1]:.2f}, "
        f"on the image from text {layer.image:.2f}"
    )


@torch.inference_mode()
def look(model: Model, count: int) -> tuple[torch.Tensor, list[Layer]]:
    """Which tokens are image tokens, `[tokens]`, and what each layer sees, with a plain prompt."""
    model.network.set_attn_implementation("eager")
    inputs = model.processor(
        images=[draw(scene) for scene in scenes(99, count)],
        text=[model.prompt(DESCRIBE)] * count,
        add_special_tokens=False,
        return_tensors="pt",
    )
    seen = model.network(**inputs, output_hidden_states=True, output_attentions=True)
    is_image = inputs["input_ids"][0] == model.network.config.image_token_id
    states = zip(seen.hidden_states[:-1], seen.attentions, strict=True)
    return is_image, [_layer(*each, is_image) for each in states]


def _layer(state: torch.Tensor, attention: torch.Tensor, is_image: torch.Tensor) -> Layer:
    scale = state.square().mean(dim=-1, keepdim=True).add(1e-6).sqrt()
    rows = attention.mean(dim=(0, 1))
    after = torch.arange(len(rows)) > is_image.nonzero().max()
    return Layer(
        state.abs() / scale,
        (float(rows[is_image, 0].mean()), float(rows[after, 0].mean())),
        float(rows[after][:, is_image].sum(dim=-1).mean()),
    )


if __name__ == "__main__":
    sys.exit(main())
