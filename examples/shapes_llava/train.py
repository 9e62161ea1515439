"""Trains the model from nothing, first its eyes, then its language, on one core.

    OMP_NUM_THREADS=1 python -m examples.shapes_llava.train --out /tmp/shapes-llava

The vision tower learns to name colour and shape on each patch of a picture; then it stays as it
is, and the projector and the language model learn to answer. Scenes are never repeated.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from examples.shapes_llava.batches import Conversations, Source
from examples.shapes_llava.checkpoint import save
from examples.shapes_llava.network import build_model
from examples.shapes_llava.scenes import COLOURS, SHAPES, USUAL
from examples.shapes_llava.tokens import build_processor, build_tokenizer

REPORT = 25
WARM_UP = 100


def main(argv: Sequence[str] | None = None) -> int:
    """Train and save."""
    args = _parser().parse_args(argv)
    torch.manual_seed(args.seed)
    processor = build_processor(build_tokenizer())
    model = build_model(processor.tokenizer)
    if args.vision:
        model.model.vision_tower.load_state_dict(torch.load(args.vision))
    else:
        source = Source(processor, args.seed + 1, USUAL)
        learn_to_see(model, source, args.vision_steps, args.vision_batch)
    if args.save_vision:
        torch.save(model.model.vision_tower.state_dict(), args.save_vision)
    for parameter in model.model.vision_tower.parameters():
        parameter.requires_grad_(False)
    source = Source(processor, args.seed + 2, args.usual)
    learn_to_answer(model, source, args, lambda: save(model, processor, args.out))
    save(model, processor, args.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--usual", type=float, default=0.98, help="companions when answering")
    parser.add_argument("--vision-steps", type=int, default=600)
    parser.add_argument("--vision-batch", type=int, default=64)
    parser.add_argument(
        "--vision", type=Path, help="a saved vision tower, in place of training one"
    )
    parser.add_argument("--save-vision", type=Path, help="file for the trained vision tower")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--keep", type=int, help="save every so many steps, too")
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--questions", type=int, default=8, help="about each picture")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--decay", type=float, default=0.1, help="weight decay")
    return parser


def learn_to_see(
    model: LlavaForConditionalGeneration, source: Source, steps: int, batch: int
) -> None:
    """Train the vision tower, with heads that are thrown away afterwards."""
    tower = model.model.vision_tower
    width = model.config.vision_config.hidden_size
    heads = nn.ModuleList([nn.Linear(width, 1 + len(x)) for x in (COLOURS, SHAPES)])
    trained = nn.ModuleList([tower, heads])
    for step, _ in _steps(trained, steps, 1e-3, 0.05, "see"):
        pixels, *labels = source.patches(batch)
        features = tower(pixels).last_hidden_state[:, 1:]
        features = functional.layer_norm(features, (width,))
        losses = [
            functional.cross_entropy(head(features).flatten(0, 1), wanted.flatten())
            for head, wanted in zip(heads, labels, strict=True)
        ]
        step(sum(losses))


def learn_to_answer(
    model: LlavaForConditionalGeneration,
    source: Source,
    args: argparse.Namespace,
    keep: Callable[[], None],
) -> None:
    """Train projector and language model; the vision tower is left as it is."""
    trained = nn.ModuleList(
        [model.model.multi_modal_projector, model.model.language_model, model.lm_head]
    )
    for step, index in _steps(trained, args.steps, args.rate, args.decay, "answer"):
        step(_answer_loss(model, source.conversations(args.batch, args.questions)))
        if args.keep and index % args.keep == 0:
            keep()


def _answer_loss(model: LlavaForConditionalGeneration, batch: Conversations) -> torch.Tensor:
    parts = model.model
    with torch.no_grad():
        features = parts.vision_tower(batch.pixels).last_hidden_state[:, 1:]
    image = parts.multi_modal_projector(features)
    embedded = parts.language_model.embed_tokens(batch.tokens)
    places = (batch.tokens == model.config.image_token_id)[..., None].expand_as(embedded)
    embedded = embedded.masked_scatter(places, image)
    states = parts.language_model(
        inputs_embeds=embedded,
        attention_mask=batch.visible,
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state
    learnt = batch.targets >= 0
    return functional.cross_entropy(model.lm_head(states[learnt]), batch.targets[learnt])


def _steps(
    trained: nn.Module, steps: int, rate: float, decay: float, name: str
) -> Iterator[tuple[Callable[[torch.Tensor], None], int]]:
    """Yields a function that takes the loss of a step and updates the weights."""
    parameters = [p for p in trained.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _factor(step, steps))
    start, mean = time.monotonic(), 0.0

    def update(loss: torch.Tensor) -> None:
        nonlocal mean
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        mean += loss.item() / REPORT

    for index in range(1, steps + 1):
        yield update, index
        if index % REPORT == 0:
            seconds = time.monotonic() - start
            sys.stdout.write(f"{name} {index}/{steps} loss {mean:.4f} {seconds:.0f} s\n")
            sys.stdout.flush()
            mean = 0.0


def _factor(step: int, steps: int) -> float:
    """Of the learning rate: a rise, then half a cosine down to nothing."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / max(steps - WARM_UP, 1)))


if __name__ == "__main__":
    sys.exit(main())
