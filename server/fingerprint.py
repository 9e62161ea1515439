"""The hash that says which architecture a model has, from its Hugging Face configuration.

It is the same wherever the files lie, whatever the data type, and whichever version of transformers
wrote or read the configuration. Weights do not enter: a fine-tuned model keeps its hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

# What defines the text model. A field that a configuration has not got is left out.
TEXT = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "num_local_experts",
    "num_experts",
    "moe_intermediate_size",
)
VISION = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
)


def fingerprint(config: Any, text: Any) -> str:  # noqa: ANN401 - one of many classes
    """SHA-256 over what defines the architecture, 64 hex digits.

    Args:
        config: of the whole model, of transformers.
        text: of its text model; the same where there is nothing else.
    """
    vision = getattr(config, "vision_config", None)
    form = {
        "architectures": getattr(config, "architectures", None),
        "text": _fields(text, TEXT) | _defaults(text),
        "rope": _rope(text),
        "vision": None if vision is None else _fields(vision, VISION),
    }
    canonical = json.dumps(form, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _fields(config: Any, names: tuple[str, ...]) -> dict[str, Any]:  # noqa: ANN401
    found = {name: getattr(config, name, None) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _defaults(text: Any) -> dict[str, Any]:  # noqa: ANN401
    """Fields that some configurations leave to what they follow from."""
    heads = text.num_attention_heads
    return {
        "num_key_value_heads": getattr(text, "num_key_value_heads", None) or heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
    }


def _rope(text: Any) -> Any:  # noqa: ANN401
    """Rotary parameters in one form: older versions spread them over several fields."""
    parameters = getattr(text, "rope_parameters", None)
    if parameters is None:
        parameters = {
            "rope_theta": getattr(text, "rope_theta", None),
            **(getattr(text, "rope_scaling", None) or {}),
        }
    partial = getattr(text, "partial_rotary_factor", None)
    return _plain({"partial_rotary_factor": partial} | dict(parameters))


def _plain(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, Mapping):
        named = {("rope_type" if name == "type" else name): each for name, each in value.items()}
        kept = {name: _plain(each) for name, each in named.items() if each is not None}
        return {name: each for name, each in kept.items() if (name, each) not in _UNSAID}
    # 10000 and 10000.0 are one number.
    return int(value) if isinstance(value, float) and value.is_integer() else value


# Values that some versions write and others leave out.
_UNSAID = (("rope_type", "default"), ("partial_rotary_factor", 1))
