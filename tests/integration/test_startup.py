"""What cannot be calibrated does not start, and says what to do."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests.integration.serving import command, free_port

SECONDS = 300

# Breaks the plug-in in the engine's processes only, as a half-installed environment would.
# vLLM logs such a failure and runs on with its stock attention.
BROKEN_PLUGIN = """
import sys
from importlib.abc import MetaPathFinder

class Broken(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "server.engine.plugin" and "--multiprocessing-fork" in sys.orig_argv:
            raise ImportError("broken on purpose")

sys.meta_path.insert(0, Broken())
"""


def start(*flags: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a server that is expected to give up; nothing of it is left behind if it does not."""
    arguments = command("--host", "127.0.0.1", "--port", str(free_port()), *flags)
    with subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
        start_new_session=True,
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        (["--kv-cache-dtype", "fp8"], "--kv-cache-dtype auto"),
        (["--calibrators", "zerotuning,nothing"], "installed: act, gift, var, vhr, zerotuning"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused_with_advice(model, flags, advice):
    finished = start(*flags)
    assert finished.returncode == 2, finished.stderr[-3000:]
    last = finished.stderr.strip().splitlines()[-1]
    assert last.startswith("trimtab: ")
    assert advice in last


def test_a_worker_without_the_plugin(model, tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text(BROKEN_PLUGIN)
    finished = start(env={"PYTHONPATH": str(tmp_path)})
    output = finished.stdout + finished.stderr
    assert finished.returncode != 0
    assert "broken on purpose" in output
    assert "CPUAttentionBackendImpl is not one Trimtab extends" in output
    assert "Application startup complete" not in output


def test_a_cache_layout_that_cannot_be_read(model, tmp_path: Path):
    shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    config = LlamaConfig(
        hidden_size=160,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=80,
        vocab_size=49152,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    finished = start(str(tmp_path / "model"))
    assert finished.returncode == 2
    last = finished.stderr.strip().splitlines()[-1]
    assert "the layout 'vec16'" in last
    assert "head sizes must be multiples of 32" in last
