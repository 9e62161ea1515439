import asyncio
import subprocess
import sys
from types import SimpleNamespace

import pytest
import vllm

from server.engine import startup
from server.engine.startup import StartupRefused, check_config, check_version, verify_workers


def config(**changes):
    """A configuration that can be calibrated, with `section__field=value` changed."""
    sections = {
        "parallel_config": {
            "worker_cls": startup.CPU_WORKER,
            "tensor_parallel_size": 1,
            "pipeline_parallel_size": 1,
            "data_parallel_size": 1,
            "decode_context_parallel_size": 1,
            "prefill_context_parallel_size": 1,
        },
        "scheduler_config": {"scheduler_cls": startup.SCHEDULER},
        "cache_config": {
            "cache_dtype": "auto",
            "kv_offloading_size": None,
            "kv_sharing_fast_prefill": False,
        },
        "model_config": {
            "use_mla": False,
            "is_encoder_decoder": False,
            "is_hybrid": False,
            "is_attention_free": False,
            "is_mm_prefix_lm": False,
            "runner_type": "generate",
            "architecture": "SomeForCausalLM",
            "dtype": "torch.bfloat16",
        },
    }
    optional = dict.fromkeys(("speculative_config", "lora_config", "kv_transfer_config"))
    for name, value in changes.items():
        section, _, field = name.partition("__")
        if field:
            sections[section][field] = value
        else:
            optional[section] = value
    made = {name: SimpleNamespace(**fields) for name, fields in sections.items()}
    return SimpleNamespace(**made, **optional)


@pytest.fixture(autouse=True)
def planned(monkeypatch):
    """The cache layout vLLM plans on this CPU."""
    layouts = ["vec"]
    monkeypatch.setattr(startup, "current_platform", SimpleNamespace(is_cpu=lambda: True))
    monkeypatch.setattr(startup, "planned_layout", lambda config: layouts[-1])
    return layouts


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"parallel_config__tensor_parallel_size": 2},
        {"cache_config__cache_dtype": "bfloat16"},
    ],
    ids=str,
)
def test_a_configuration_that_can_be_calibrated_passes(change):
    check_config(config(**change))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"parallel_config__worker_cls": "other.Worker"}, "leave out --worker-cls"),
        ({"scheduler_config__scheduler_cls": None}, "leave out --scheduler-cls"),
        ({"parallel_config__pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
        ({"parallel_config__data_parallel_size": 2}, "--data-parallel-size"),
        ({"parallel_config__decode_context_parallel_size": 2}, "--decode-context-parallel-size"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "--prefill-context-parallel-size"),
        ({"cache_config__kv_offloading_size": 1.0}, "--kv-offloading-size"),
        ({"cache_config__kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill"),
        ({"cache_config__cache_dtype": "float16"}, "--kv-cache-dtype auto"),
        ({"speculative_config": object()}, "--speculative-config"),
        ({"lora_config": object()}, "--enable-lora"),
        ({"kv_transfer_config": object()}, "--kv-transfer-config"),
        ({"cache_config__cache_dtype": "fp8_e4m3"}, "--kv-cache-dtype auto"),
        ({"model_config__use_mla": True}, "SomeForCausalLM uses multi-head latent attention"),
        ({"model_config__is_hybrid": True}, "SomeForCausalLM has layers without attention"),
        (
            {"model_config__is_mm_prefix_lm": True},
            "SomeForCausalLM lets image tokens see",
        ),
        ({"model_config__is_encoder_decoder": True}, "not a decoder-only language model"),
        ({"model_config__runner_type": "pooling"}, "leave out --runner and --convert"),
    ],
)
def test_each_obstacle_is_refused_with_its_way_out(change, said):
    with pytest.raises(StartupRefused, match=said):
        check_config(config(**change))


def test_all_obstacles_are_named_at_once():
    with pytest.raises(StartupRefused) as caught:
        check_config(config(lora_config=object(), cache_config__cache_dtype="fp8"))
    message = str(caught.value)
    assert "--enable-lora asks for what cannot be calibrated: leave it out; " in message
    assert "--kv-cache-dtype" in message


def test_a_cache_layout_that_cannot_be_read_is_refused(planned):
    planned.append("amx")
    with pytest.raises(StartupRefused, match="--dtype float32"):
        check_config(config())


def on_gpu(**changes):
    """A configuration that is let in on a GPU where untested things are."""
    usual = {
        "parallel_config__worker_cls": startup.GPU_WORKER,
        "parallel_config__enable_dbo": False,
        "model_config__is_multimodal_model": False,
        "model_config__enforce_eager": False,
    }
    return config(**usual | changes)


@pytest.fixture
def gpu(monkeypatch):
    platform = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: True)
    monkeypatch.setattr(startup, "current_platform", platform)
    return platform


def test_a_gpu_is_refused_unless_untested_things_are_allowed(gpu):
    with pytest.raises(StartupRefused, match="--allow-untested-vllm to be the first"):
        check_config(on_gpu())
    check_config(on_gpu(), allow_untested=True)
    check_config(on_gpu(parallel_config__tensor_parallel_size=2), allow_untested=True)


def test_other_platforms_are_refused(gpu):
    gpu.is_cuda = lambda: False
    with pytest.raises(StartupRefused, match="neither a CPU nor an NVIDIA GPU"):
        check_config(on_gpu(), allow_untested=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"parallel_config__enable_dbo": True}, "--enable-dbo"),
        ({"model_config__is_multimodal_model": True}, "--enforce-eager"),
        ({"parallel_config__worker_cls": startup.CPU_WORKER}, "--worker-cls"),
        ({"cache_config__cache_dtype": "fp8"}, "--kv-cache-dtype auto"),
    ],
)
def test_what_a_gpu_cannot_do_is_refused_with_its_way_out(gpu, change, said):
    with pytest.raises(StartupRefused, match=said):
        check_config(on_gpu(**change), allow_untested=True)


@pytest.mark.parametrize(
    ("version", "tested"),
    [("0.32.0", True), ("0.32.1+cpu", True), ("0.31.9", False), ("0.320.0", False)],
)
def test_only_tested_versions_start(monkeypatch, version, tested):
    monkeypatch.setattr(vllm, "__version__", version)
    check_version(allow_untested=True)
    if tested:
        check_version(allow_untested=False)
    else:
        with pytest.raises(StartupRefused, match="--allow-untested-vllm") as caught:
            check_version(allow_untested=False)
        assert version in str(caught.value)


def verify(answer):
    asked = []

    async def collective_rpc(method):
        asked.append(method)
        if isinstance(answer, Exception):
            raise answer
        return answer

    asyncio.run(verify_workers(SimpleNamespace(collective_rpc=collective_rpc)))
    return asked


def test_every_worker_is_asked():
    assert verify([{"rank": 0, "ready": True}, {"rank": 1, "ready": True}]) == [
        "calibration_status"
    ]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ([], "have not loaded Trimtab"),
        ([{"ready": True}, {"ready": False}, {}], r"workers \[1, 2\] have not loaded Trimtab"),
        (AttributeError("no calibration_status"), "do not know Trimtab .no calibration_status"),
        (RuntimeError("Call to calibration_status method failed"), "do not know Trimtab"),
    ],
)
def test_a_worker_without_the_plug_in_stops_the_start(answer, said):
    with pytest.raises(StartupRefused, match=said) as caught:
        verify(answer)
    assert "VLLM_PLUGINS" in str(caught.value)


def arguments(**changes):
    """Arguments without a way past admission."""
    usual = {"grpc": False, "headless": False, "enable_scale_out": False, "tokens_only": False}
    return SimpleNamespace(**{**usual, **changes})


def test_usual_arguments_pass():
    startup.check_arguments(arguments())


@pytest.mark.parametrize("flag", ["grpc", "headless", "enable_scale_out", "tokens_only"])
def test_a_front_end_past_admission_is_refused(flag):
    with pytest.raises(StartupRefused, match=f"--{flag.replace('_', '-')} opens a way"):
        startup.check_arguments(arguments(**{flag: True}))


def test_the_rust_front_end_is_refused(monkeypatch):
    monkeypatch.setattr(startup.envs, "VLLM_USE_RUST_FRONTEND", True, raising=False)
    with pytest.raises(StartupRefused, match="VLLM_USE_RUST_FRONTEND"):
        startup.check_arguments(arguments())


def test_startup_checks_do_not_load_numba():
    """vLLM's worker fails to start where numba is loaded before it."""
    code = "import sys, server.engine.startup; sys.exit('numba' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_names_of_presets_need_names_to_be_checked(monkeypatch):
    startup.check_names()
    monkeypatch.setenv("VLLM_SKIP_MODEL_NAME_VALIDATION", "1")
    with pytest.raises(StartupRefused, match="unset it, or leave out --calibration-presets"):
        startup.check_names()
