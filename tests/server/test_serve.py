"""Flags of a real command line, resolved by vLLM as at a start, without starting anything."""

from __future__ import annotations

import json
import os

import pytest
from transformers import BertConfig, DeepseekV2Config, LlamaConfig, WhisperConfig
from vllm.engine.arg_utils import AsyncEngineArgs

from server import serve
from server.engine.ending import EngineDied
from server.engine.startup import StartupRefused
from server.fingerprint import fingerprint
from server.serve import HEADER_BYTES, checked, main, parse

LLAMA = LlamaConfig(
    architectures=["LlamaForCausalLM"],
    hidden_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=64,
)
OTHERS = {
    "latent attention": DeepseekV2Config(
        architectures=["DeepseekV2ForCausalLM"], num_hidden_layers=2, q_lora_rank=None
    ),
    "encoder-decoder": WhisperConfig(
        architectures=["WhisperForConditionalGeneration"], encoder_layers=1, decoder_layers=1
    ),
    "pooling": BertConfig(architectures=["BertModel"], num_hidden_layers=1),
}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """A start sets variables for the processes it is about to start."""
    monkeypatch.setattr(os, "environ", os.environ.copy())


@pytest.fixture
def check(tmp_path):
    """Resolve a command line for a model of which there is the configuration alone."""

    def run(config, *flags):
        (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
        # float32: with bfloat16, what may be served depends on the processor.
        usual = [str(tmp_path), "--skip-tokenizer-init", "--dtype", "float32"]
        return checked([*usual, *flags], lambda line: None)

    return run


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--tensor-parallel-size", "2"),
        ("--kv-cache-dtype", "auto"),
        ("--api-server-count", "2"),
    ],
    ids=" ".join,
)
def test_what_can_be_calibrated_passes(check, flags):
    check(LLAMA, *flags)


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        (["--pipeline-parallel-size", "2"], "--pipeline-parallel-size asks for"),
        (["--data-parallel-size", "2"], "--data-parallel-size asks for"),
        (
            ["--tensor-parallel-size", "2", "--decode-context-parallel-size", "2"],
            "--decode-context-parallel-size asks for",
        ),
        (
            ["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 2}'],
            "--speculative-config asks for",
        ),
        (["--enable-lora"], "--enable-lora asks for"),
        (["--kv-cache-dtype", "fp8"], "--kv-cache-dtype auto"),
        (["--kv-cache-dtype", "fp8_e5m2"], "--kv-cache-dtype auto"),
        (["--kv-cache-dtype", "int8_per_token_head"], "--kv-cache-dtype auto"),
        (["--kv-cache-dtype", "bfloat16"], "--kv-cache-dtype auto"),
        (
            ["--kv-transfer-config", '{"kv_connector": "ExampleConnector", "kv_role": "kv_both"}'],
            "--kv-transfer-config asks for",
        ),
        (["--kv-offloading-size", "1"], "--kv-offloading-size asks for"),
        (["--kv-sharing-fast-prefill"], "--kv-sharing-fast-prefill asks for"),
        (["--runner", "pooling"], "leave out --runner and --convert"),
        (["--convert", "embed"], "leave out --runner and --convert"),
        (["--worker-cls", "vllm.v1.worker.cpu_worker.CPUWorker"], "leave out --worker-cls"),
        (["--scheduler-cls", "vllm.v1.core.sched.scheduler.Scheduler"], "--scheduler-cls"),
        (["--headless"], "--headless opens a way"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_feature_is_refused_by_its_flag(check, flags, advice):
    with pytest.raises(StartupRefused, match=advice):
        check(LLAMA, *flags)


def write(folder, name, content):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_profiles_and_presets_are_read_before_anything_runs(check, profile_content, tmp_path):
    model = {
        "config_hash": fingerprint(LLAMA, LLAMA),
        "architecture": "LlamaForCausalLM",
        "layers": 2,
        "query_heads": 4,
    }
    content = profile_content(model=model, parameters={"gamma": 0.5, "heads": {"1": [3]}})
    folder = write(tmp_path / "profiles", "calm.json", content)
    presets = write(tmp_path, "presets.toml", "[presets.p]\nmethod='zerotuning'\nprofile='calm'")
    flags = ["--calibration-profiles", str(folder), "--default-calibration", "p"]
    flags += ["--calibration-presets", str(presets / "presets.toml")]
    check(LLAMA, *flags)
    with pytest.raises(StartupRefused, match=r"--calibration-presets: .*served as x:p"):
        check(LLAMA, *flags, "--served-model-name", "x", "x:p")


@pytest.mark.parametrize(
    ("flag", "name", "content", "said"),
    [
        (
            "profiles",
            "calm.json",
            None,
            r"^--calibration-profiles: calm\.json: model: it is for LlamaForCausalLM with 4 layers "
            r"of 6 query heads .*, and the model is LlamaForCausalLM with 2 layers of 4",
        ),
        ("profiles", "calm.json", "{}", r"^--calibration-profiles: calm\.json: format: "),
        (
            "presets",
            "presets.toml",
            "[presets.p]\nmethod='act'\nbeta=2",
            "^--calibration-presets: preset 'p': calibration.beta is 2",
        ),
    ],
)
def test_a_bad_file_stops_the_start_with_one_line(
    check, profile_content, tmp_path, flag, name, content, said
):
    folder = write(tmp_path / "files", name, content or profile_content())
    path = folder if flag == "profiles" else folder / name
    with pytest.raises(StartupRefused, match=said) as caught:
        check(LLAMA, f"--calibration-{flag}", str(path))
    assert str(tmp_path) not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_default_that_makes_no_sense_stops_the_start(check):
    with pytest.raises(StartupRefused, match=r"^--default-calibration: there is no"):
        check(LLAMA, "--default-calibration", "nothing")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("latent attention", "DeepseekV2ForCausalLM uses multi-head latent attention"),
        ("encoder-decoder", "WhisperForConditionalGeneration is not a decoder-only"),
        ("pooling", "BertModel would be run for pooling"),
    ],
)
def test_a_model_is_refused_by_its_name(check, model, said):
    with pytest.raises(StartupRefused, match=said):
        check(OTHERS[model])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tensor-parallel-size", "3"], "must be divisible by tensor parallel size"),
        (["--prefill-context-parallel-size", "2"], "does not support: prefill context parallel"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_vllm_refuses_itself_does_not_start_either(check, flags, said):
    with pytest.raises(ValueError, match=said):
        check(LLAMA, *flags)


def test_headers_are_bounded_more_closely_than_by_vllm():
    assert parse([]).h11_max_incomplete_event_size == HEADER_BYTES
    given = parse(["--h11-max-incomplete-event-size", "1000"])
    assert given.h11_max_incomplete_event_size == 1000


def test_a_key_file_that_cannot_be_used_stops_the_start(capsys, tmp_path):
    assert main([str(tmp_path), "--api-key-file", str(tmp_path / "none")]) == 2
    assert "--api-key-file" in capsys.readouterr().err


def test_an_engine_that_died_is_no_success(monkeypatch, capsys):
    def die(argv, report):
        raise EngineDied("the engine has died")

    monkeypatch.setattr(serve, "serve", die)
    assert main([]) == 1
    assert "the engine has died" in capsys.readouterr().err


def test_the_queue_is_bounded_in_sequences_and_tokens(check):
    args = check(LLAMA, "--max-num-seqs", "8", "--max-queued-requests", "5")
    assert (args.max_num_queued_reqs, args.max_num_queued_tokens) == (13, serve.QUEUED_TOKENS)
    args = check(LLAMA, "--max-num-queued-reqs", "7", "--max-num-queued-tokens", "900")
    assert (args.max_num_queued_reqs, args.max_num_queued_tokens) == (7, 900)


def test_workers_that_wait_for_a_dead_one_do_not_wait_for_long(check):
    check(LLAMA)
    assert os.environ["VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS"] == "2"


def test_unless_somebody_says_how_long(check, monkeypatch):
    monkeypatch.setenv("VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS", "9")
    check(LLAMA)
    assert os.environ["VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS"] == "9"


def test_compiled_code_is_not_reused_across_versions(check, monkeypatch):
    def key() -> str:
        args = check(LLAMA)
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
        return config.compute_hash()

    known = key()
    assert key() == known
    monkeypatch.setattr(serve, "__version__", "0.0.0")
    assert key() != known
