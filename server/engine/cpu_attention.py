"""vLLM's CPU attention backend, with calibration beside and after the stock kernel."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from server.engine.context import StepContext
from server.engine.layouts import unreadable_layout
from server.engine.step import StepPlan
from server.kernels.partials import AttentionGeometry, PagedCache


@dataclass
class CalibratedMetadata(CPUAttentionMetadata):
    """Metadata of a step in which calibrated requests take part."""

    calibration: StepPlan = field(kw_only=True)


class CalibratedMetadataBuilder(CPUAttentionMetadataBuilder):
    """Adds the step's plan; the stock metadata, untouched, where there is none."""

    calibration: StepContext | None = None

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CPUAttentionMetadata:
        """Build as vLLM does, then attach the plan."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        plan = self.calibration.plan(common_attn_metadata) if self.calibration else None
        if plan is None:
            return metadata
        return CalibratedMetadata(**vars(metadata), calibration=plan)


class CalibratedAttention(CPUAttentionBackendImpl):
    """Runs the stock kernel unless calibration computes all rows itself, then calibrates."""

    layer_index: int | None = None
    geometry: AttentionGeometry

    def calibrate_as(self, layer_index: int) -> None:
        """Become decoder layer `layer_index`; without this the layer is never calibrated."""
        self.layer_index = layer_index
        none = torch.empty(0)
        self.geometry = AttentionGeometry(
            scale=self.scale,
            soft_cap=float(self.logits_soft_cap),
            window=max(self.sliding_window, 0),
            alibi_slopes=none if self.alibi_slopes is None else self.alibi_slopes.float(),
            sinks=none if self.sinks is None else self.sinks.float(),
        )

    def forward(
        self,
        layer: Any,  # noqa: ANN401 - vLLM's AttentionLayer
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention as vLLM computes it, calibrated where the plan says so."""
        stock = partial(super().forward, layer)
        rest = kv_cache, attn_metadata, output, output_scale, output_block_scale
        index = self.layer_index
        if (
            index is None
            or not isinstance(attn_metadata, CalibratedMetadata)
            or attn_metadata.calibration.idle(index)
        ):
            untouched: Tensor = stock(query, key, value, *rest)
            return untouched
        plan = attn_metadata.calibration
        # All rows or none: a smaller batch is split otherwise among threads, and rounded otherwise.
        if len(plan.computed(index)) < len(attn_metadata.seq_lens):
            stock(query, key, value, *rest)
        pages, kv_heads, block, width = kv_cache.shape
        cache = PagedCache(
            kv_cache.view(pages, kv_heads, 2, block * width // 2), attn_metadata.block_table
        )
        plan.apply(index, query, output, cache, self.geometry)
        return output


class CalibratedBackend(CPUAttentionBackend):
    """Registered in place of vLLM's CPU_ATTN."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """Implementation class."""
        return CalibratedAttention

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        """Metadata builder class."""
        return CalibratedMetadataBuilder


def unreadable(layer: Any) -> str | None:  # noqa: ANN401 - vLLM's Attention module
    """Why a layer cannot be calibrated, None where it can."""
    if not isinstance(layer.impl, CalibratedAttention):
        return f"its attention backend {type(layer.impl).__name__} is not one Trimtab extends"
    return unreadable_layout(getattr(layer, "isa", None))
