"""vLLM's GPU worker, keeping the state of calibrated requests.

Never run on a GPU: see docs/gpu.md for what was tested without one.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.gpu_worker import Worker

from calibrators import registry
from server.engine.calibrating import Calibrating
from server.engine.facts import calibrators_of
from server.engine.gpu_attention import unreadable
from server.engine.gpu_room import Largest, Method
from server.engine.graphs import keep_out
from server.kernels import gpu as kernels


class CalibratedGPUWorker(Calibrating, Worker):
    """GPU worker that calibrates, with either model runner."""

    def determine_available_memory(self) -> int:
        """Profile as vLLM does, with room for the largest step taken meanwhile.

        The room is given back and stays outside of the KV cache: the kernels take theirs from it.
        """
        stock, room = self.model_runner.profile_run, self.room()

        def profile_run(**options: Any) -> None:  # noqa: ANN401 - vLLM's
            held = torch.empty(room, dtype=torch.uint8, device=self.layer_device())
            stock(**options)
            del held

        self.model_runner.profile_run = profile_run
        try:
            available: int = super().determine_available_memory()
        finally:
            del self.model_runner.profile_run
        return available

    def room(self) -> int:
        """Bytes that calibration takes in the largest step."""
        model, parallel = self.vllm_config.model_config, self.vllm_config.parallel_config
        scheduler = self.vllm_config.scheduler_config
        largest = Largest(
            rows=scheduler.max_num_batched_tokens,
            slots=scheduler.max_num_seqs,
            layers=model.get_num_layers(parallel),
            query_heads=model.get_num_attention_heads(parallel),
            kv_heads=model.get_num_kv_heads(parallel),
            head_dim=model.get_head_size(),
        )
        offer = registry.load(calibrators_of(self.vllm_config)).values()
        return largest.room([Method(len(each.pools), len(each.parameters)) for each in offer])

    def initialize_from_config(self, kv_cache_config: Any) -> None:  # noqa: ANN401 - vLLM's
        """Set up and wire, then keep calibrated steps out of full graphs."""
        super().initialize_from_config(kv_cache_config)
        keep_out(self.model_runner, self._calibrates)

    def _calibrates(self) -> bool:
        return self.calibration is not None and self.calibration.calibrates

    def unreadable(self, layer: Any) -> str | None:  # noqa: ANN401 - vLLM's Attention module
        """Why a layer cannot be calibrated, None where it can."""
        return unreadable(layer)

    def layer_device(self) -> torch.device:
        """The GPU."""
        device: torch.device = self.device
        return device

    def compile_for(self, layer: Any) -> None:  # noqa: ANN401 - vLLM's Attention module
        """Compile the kernels for a layer's types, so that fewer requests wait for it."""
        kernels.warm_up(layer.kv_cache, layer.num_heads, layer.impl.geometry)
