"""The residual stream of a model in transformers, on the CPU: what the server does not tell.

The model is loaded for this and given up again, before a server needs the memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import urlopen

from server import models
from server.evaluation.command import Unusable, progress
from server.evaluation.samples import Sample
from server.profiling.channels import Channels, Scaled, Seen, find
from server.profiling.pairs import Bar
from server.profiling.var import FIRST_LAYER

if TYPE_CHECKING:
    from PIL.Image import Image

# As in VAR's phi.
EPSILON = 1e-6


def channels(
    name: str, samples: Sequence[Sample], peak: float, tau: float | None, bar: Bar
) -> Channels:
    """Sink channels of a model, found in the prompts of samples.

    Args:
        name: of the model, embedded or not, or its folder.
        samples: chats with images.
        peak: of `channels.find`.
        tau: likewise.
        bar: shows the progress.

    Raises:
        Unusable: transformers cannot run the model, or a sample on it.
        NoSinks: of `channels.find`.
        ModelError: an embedded model cannot be prepared.
    """
    model, processor = _loaded(name)
    with bar("observe", 2 * len(samples), 0) as advance:

        def look() -> Iterator[Seen]:
            for sample in samples:
                yield _seen(model, processor, sample)
                advance()

        return find(look, peak, tau)


def _loaded(name: str) -> tuple[Any, Any]:
    from transformers import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
        AutoModelForImageTextToText,
        AutoProcessor,
    )

    embedded = name in models.EMBEDDED
    folder = str(models.prepare(name, report=progress)) if embedded else name
    try:
        config = AutoConfig.from_pretrained(folder)
        if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            raise Unusable(f"--model {name}: takes no images, as transformers has it")
        if getattr(config, "image_token_id", None) is None:
            raise Unusable(f"--model {name}: it has no token for images; --sink-dims does without")
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
        return model.eval(), AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as error:
        raise Unusable(f"--model {name}: transformers cannot load it: {_short(error)}") from None


def _seen(model: Any, processor: Any, sample: Sample) -> Seen:  # noqa: ANN401
    import torch
    from jinja2 import TemplateError
    from PIL.Image import DecompressionBombError

    try:
        inputs = processor.apply_chat_template(
            [_message(message) for message in sample.messages],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(dtype=model.dtype)
    except (OSError, ValueError, TypeError, TemplateError, DecompressionBombError) as error:
        raise Unusable(f"sample {sample.id} cannot be looked at: {_short(error)}") from None
    with torch.inference_mode():
        seen = model(**inputs, use_cache=False, output_hidden_states=True, logits_to_keep=1)
    # The last state is behind all layers.
    states = seen.hidden_states[:-1]
    images = (inputs["input_ids"][0] == model.config.image_token_id).numpy()
    return Seen((_scaled(states[layer]) for layer in _looked_at(len(states))), images)


def _looked_at(layers: int) -> Iterable[int]:
    """Those that VAR calibrates by default; all of a model that has none of these."""
    return range(FIRST_LAYER, layers - 1) or range(layers)


def _scaled(state: Any) -> Scaled:  # noqa: ANN401
    stream = state[0].float()
    rms = stream.pow(2).mean(-1, keepdim=True).add(EPSILON).sqrt()
    scaled: Scaled = (stream.abs() / rms).numpy()
    return scaled


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return {**message, "content": [_part(part) for part in parts]}


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    if part.get("type") != "image_url":
        return dict(part)
    return {"type": "image", "image": _image(part["image_url"]["url"])}


def _image(url: str) -> Image:
    from PIL.Image import open as read

    # From where else images may come is for the server to say.
    if urlsplit(url).scheme not in ("data", "file"):
        raise ValueError("its image is neither a data: nor a file: URL; --sink-dims does without")
    with urlopen(url) as file:
        return read(file).convert("RGB")


def _short(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]
