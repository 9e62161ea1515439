"""vLLM's GPU attention backends, with calibration after the stock kernel.

Never run on a GPU: see docs/gpu.md for what was tested without one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from server.engine.context import StepContext
from server.kernels.partials import AttentionGeometry, StridedCache

# Where the residual stream finds it, too, on all kinds of metadata.
PLAN = "calibration"
READABLE = (torch.float32, torch.bfloat16, torch.float16)


class Planning:
    """Adds the step's plan to what a metadata builder builds; nothing where there is none."""

    calibration: StepContext | None = None

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:  # noqa: ANN401 - a backend's metadata
        """Build as vLLM does, then attach the plan."""
        stock: Any = super()
        metadata = stock.build(common_prefix_len, common_attn_metadata, fast_build)
        plan = self.calibration.plan(common_attn_metadata) if self.calibration else None
        if plan is not None:
            # Copies for other groups of layers keep it.
            setattr(metadata, PLAN, plan)
        return metadata


class Calibrated:
    """Runs the stock kernel for all rows, then rewrites the calibrated ones."""

    layer_index: int | None = None
    geometry: AttentionGeometry

    def calibrate_as(self, layer_index: int) -> None:
        """Become decoder layer `layer_index`; without this the layer is never calibrated."""
        self.layer_index = layer_index
        impl: Any = self
        none = torch.empty(0)
        self.geometry = AttentionGeometry(
            scale=impl.scale,
            soft_cap=float(impl.logits_soft_cap),
            # vLLM counts the keys before a row's own, -1 for all.
            window=impl.sliding_window[0] + 1,
            alibi_slopes=none if impl.alibi_slopes is None else impl.alibi_slopes.float(),
            sinks=none if impl.sinks is None else impl.sinks.float(),
        )

    def forward(
        self,
        layer: Any,  # noqa: ANN401 - vLLM's AttentionLayer
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,  # noqa: ANN401 - a backend's metadata
        output: Tensor,
        *scales: Tensor | None,
        **named_scales: Tensor | None,
    ) -> Tensor:
        """Attention as vLLM computes it, calibrated where the plan says so."""
        inherited: Any = super()
        given = layer, query, key, value, kv_cache, attn_metadata, output, *scales
        stock = partial(inherited.forward, *given, **named_scales)
        plan = getattr(attn_metadata, PLAN, None)
        if plan is None or self.layer_index is None:
            untouched: Tensor = stock()
            return untouched
        known = self.run(stock)
        head_dim = query.shape[2]
        keys, values = kv_cache[..., :head_dim], kv_cache[..., head_dim:]
        cache = StridedCache(keys, values, attn_metadata.block_table)
        plan.apply(self.layer_index, query, output, cache, self.geometry, known)
        return output

    def run(self, stock: Callable[[], Tensor]) -> Tensor | None:
        """Run the stock kernel; its log-sum-exps `[query_heads, tokens]`, where it has them."""
        stock()
        return None


class LogSumExps:
    """Stands in for FlashAttention's function, and keeps the log-sum-exps of calibrated layers.

    Asking for them is an argument of the call, which `forward` of the stock implementation does
    not pass on; so the name that it calls is replaced. Where nobody asks the call goes through as
    it is.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._wanted = False
        self._found: list[Tensor] = []

    def __call__(self, *args: Any, **options: Any) -> Any:  # noqa: ANN401 - FlashAttention's
        """Attention."""
        if not self._wanted:
            return self._function(*args, **options)
        answer = self._function(*args, **options | {"return_softmax_lse": True})
        self._found.append(answer[1])
        return answer if options.get("return_softmax_lse") else answer[0]

    def of(self, call: Callable[[], Tensor]) -> Tensor | None:
        """What `call` left; None where it came by no attention.

        Nor where it came by several: of keys in parts, as in a cascade, each knows its own alone.
        """
        self._wanted, self._found = True, []
        try:
            call()
        finally:
            self._wanted = False
        found, self._found = self._found, []
        return found[0] if len(found) == 1 else None


class CalibratedFlashAttention(Calibrated, FlashAttentionImpl):
    """FlashAttention, which knows the log-sum-exps of its rows."""

    log_sum_exps: LogSumExps | None = None

    def calibrate_as(self, layer_index: int) -> None:
        """Become a decoder layer, and have the function it calls tell its log-sum-exps."""
        super().calibrate_as(layer_index)
        known = flash_attn.flash_attn_varlen_func
        if not isinstance(known, LogSumExps):
            known = flash_attn.flash_attn_varlen_func = LogSumExps(known)
        # Whether they count a learned sink differs between versions of FlashAttention.
        self.log_sum_exps = None if len(self.geometry.sinks) else known

    def run(self, stock: Callable[[], Tensor]) -> Tensor | None:
        """Run the stock kernel and ask it."""
        return super().run(stock) if self.log_sum_exps is None else self.log_sum_exps.of(stock)


class CalibratedTritonAttention(Calibrated, TritonAttentionImpl):
    """vLLM's Triton kernel, which keeps its log-sum-exps to itself."""


class CalibratedFlashBuilder(Planning, FlashAttentionMetadataBuilder):
    """Metadata of FlashAttention."""


class CalibratedTritonBuilder(Planning, TritonAttentionMetadataBuilder):
    """Metadata of vLLM's Triton kernel."""


class CalibratedFlashBackend(FlashAttentionBackend):
    """Takes the place of vLLM's FLASH_ATTN."""

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        """Implementation class."""
        return CalibratedFlashAttention

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        """Metadata builder class."""
        return CalibratedFlashBuilder


class CalibratedTritonBackend(TritonAttentionBackend):
    """Takes the place of vLLM's TRITON_ATTN."""

    @staticmethod
    def get_impl_cls() -> type[TritonAttentionImpl]:
        """Implementation class."""
        return CalibratedTritonAttention

    @staticmethod
    def get_builder_cls() -> type[TritonAttentionMetadataBuilder]:
        """Metadata builder class."""
        return CalibratedTritonBuilder


def unreadable(layer: Any) -> str | None:  # noqa: ANN401 - vLLM's Attention module
    """Why a layer cannot be calibrated, None where it can."""
    impl = layer.impl
    if not isinstance(impl, Calibrated):
        return (
            f"its attention backend {type(impl).__name__} is not one Trimtab extends: "
            "serve with --attention-backend FLASH_ATTN or TRITON_ATTN"
        )
    cache = layer.kv_cache
    if cache.dtype not in READABLE:
        return f"its KV cache of {cache.dtype} cannot be read: serve with --kv-cache-dtype auto"
    if getattr(impl, "use_alibi_sqrt", False) or getattr(impl, "chunk_lookback", -1) >= 0:
        return "it has a kind of ALiBi or of chunked attention that calibration does not reproduce"
    return None
