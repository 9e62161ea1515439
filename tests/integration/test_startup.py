"""What cannot be calibrated does not start, and says what to do."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.integration.serving import command, free_port

SECONDS = 240

# Breaks the plug-in in the engine's processes only, as a half-installed environment would.
# vLLM logs such a failure and runs on with its stock attention.
BROKEN_PLUGIN = """
import sys
from importlib.abc import MetaPathFinder

class Broken(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "server.engine.plugin" and "--multiprocessing-fork" in sys.argv:
            raise ImportError("broken on purpose")

sys.meta_path.insert(0, Broken())
"""


def start(*flags: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a server that is expected to give up."""
    return subprocess.run(
        command("--host", "127.0.0.1", "--port", str(free_port()), *flags),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, **(env or {})},
    )


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        (["--kv-cache-dtype", "fp8"], "--kv-cache-dtype auto"),
        (["--worker-cls", "vllm.v1.worker.cpu_worker.CPUWorker"], "leave out --worker-cls"),
        (["--tensor-parallel-size", "2"], "leave out --tensor-parallel-size"),
        (["--calibrators", "zerotuning,nothing"], "installed: zerotuning"),
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


def test_a_cache_layout_that_cannot_be_read(model):
    finished = start("--block-size", "16")
    output = finished.stdout + finished.stderr
    assert finished.returncode != 0
    assert "its KV cache has the layout 'vec16'" in output
    assert "Application startup complete" not in output
