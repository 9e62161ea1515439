"""Layouts of vLLM's CPU key/value cache, and which of them can be read.

Apart from the attention backend, because start-up checks need it and must not import numba: vLLM's
worker looks through all loaded modules before it starts, and stumbles over llvmlite's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# The cache layouts we read, by vLLM's name of the kernel's instruction set.
READABLE_LAYOUTS = frozenset({"vec"})


def unreadable_layout(layout: str | None) -> str | None:
    """Why a cache of this layout cannot be calibrated, None where it can."""
    if layout in READABLE_LAYOUTS:
        return None
    return (
        f"the KV cache would have the layout {layout!r}, and only "
        f"{', '.join(sorted(READABLE_LAYOUTS))} can be read: head sizes must be multiples of 32, "
        "and on a CPU with AMX serve with --dtype float32"
    )


def planned_layout(config: VllmConfig) -> str:
    """The cache layout vLLM will choose for a model."""
    model, cache = config.model_config, config.cache_config
    layout: str = _get_attn_isa(model.dtype, cache.block_size, model.get_head_size())
    return layout
