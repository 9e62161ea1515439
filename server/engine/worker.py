"""vLLM's CPU worker, keeping the state of calibrated requests."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.cpu_worker import CPUWorker

from calibrators import registry
from server.engine.calibrating import Calibrating
from server.engine.cpu_attention import unreadable
from server.engine.facts import calibrators_of
from server.engine.rewrites import prepare
from server.kernels import cpu as kernels


class CalibratedCPUWorker(Calibrating, CPUWorker):
    """CPU worker that calibrates."""

    def unreadable(self, layer: Any) -> str | None:  # noqa: ANN401 - vLLM's Attention module
        """Why a layer cannot be calibrated, None where it can."""
        return unreadable(layer)

    def compile_for(self, layer: Any) -> None:  # noqa: ANN401 - vLLM's Attention module
        """Compile kernels and coefficients for a layer, so that no request waits for it."""
        kernels.set_threads(torch.get_num_threads())
        cache = layer.kv_cache
        kernels.warm_up(
            cache.dtype, layer.num_heads, layer.num_kv_heads, layer.head_size, cache.shape[2]
        )
        vision = self.vllm_config.model_config.is_multimodal_model
        offer = registry.load(calibrators_of(self.vllm_config)).values()
        usable = [method for method in offer if vision or method.modality == "text"]
        prepare(usable, layer.num_heads)
