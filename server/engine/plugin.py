"""vLLM plug-in: puts the calibrated attention backend in the place of the stock one.

vLLM runs `register` in every process. A plug-in that fails here is only logged by vLLM, and
the engine would run on uncalibrated; `server.engine.startup` asks every worker before the
port opens.
"""

from __future__ import annotations


def register() -> None:
    """Override the backends we extend. Harmless where nothing is calibrated, and when run twice."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CPU_ATTN, "server.engine.cpu_attention.CalibratedBackend")
    gpu = "server.engine.gpu_attention"
    register_backend(AttentionBackendEnum.FLASH_ATTN, f"{gpu}.CalibratedFlashBackend")
    register_backend(AttentionBackendEnum.TRITON_ATTN, f"{gpu}.CalibratedTritonBackend")
