"""vLLM's CPU worker, keeping the state of calibrated requests."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.cpu_worker import CPUWorker

from server.engine.calibrating import Calibrating
from server.engine.cpu_attention import unreadable
from server.kernels import cpu as kernels


class CalibratedCPUWorker(Calibrating, CPUWorker):
    """CPU worker that calibrates."""

    def unreadable(self, layer: Any) -> str | None:  # noqa: ANN401 - vLLM's Attention module
        """Why a layer cannot be calibrated, None where it can."""
        return unreadable(layer)

    def compile_for(self, layer: Any) -> None:  # noqa: ANN401 - vLLM's Attention module
        """Compile the kernels for a layer's types, so that no request waits for it."""
        kernels.set_threads(torch.get_num_threads())
        cache = layer.kv_cache
        kernels.warm_up(
            cache.dtype, layer.num_heads, layer.num_kv_heads, layer.head_size, cache.shape[2]
        )
