"""vLLM's V2 model runner gives what V1 gives, and so do steps scheduled ahead of their answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures import llama
from tests.integration import coupled, faulty
from tests.integration.runners import STOP
from tests.integration.sharded import REQUESTS

SECONDS = 580
# Kernels of the V2 runner sum in another order.
BAND = 1e-4


def run(runner: str, model: Path, folder: Path) -> Any:
    out = folder / f"{runner}.json"
    plugins = coupled.install(folder) | faulty.install(folder)
    finished = subprocess.run(
        [sys.executable, "-m", "tests.integration.runners", runner, str(out), str(model)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        cwd=Path(__file__).parents[2],
        env={**os.environ, **plugins},
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def built(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama.build(tmp_path_factory.mktemp("model") / "small", model)


@pytest.fixture(scope="module")
def first(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By the V1 runner, step by step."""
    return run("v1", built, tmp_path_factory.mktemp("v1"))


@pytest.fixture(scope="module", params=["v2", "v2-async"])
def second(request: Any, built: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By the V2 runner, step by step and ahead."""
    return run(request.param, built, tmp_path_factory.mktemp(request.param))


def test_the_engines_are_what_they_are_taken_for(first, second, request):
    ahead = "async" in request.node.name
    assert first["runner"] == "vllm.v1.worker.cpu_model_runner"
    assert second["runner"] == "vllm.v1.worker.cpu.model_runner"
    assert second["scheduler"] == ("CalibratedAsyncScheduler" if ahead else "CalibratedScheduler")
    assert second["concurrent"] == (2 if ahead else 1)
    # So requests were announced a second time.
    assert second["preempted"] > 0


def test_answers_agree(first, second):
    for batch, expected in first["batches"].items():
        for name, one in expected.items():
            two = second["batches"][batch][name]
            assert (two["tokens"], two["finish"]) == (one["tokens"], one["finish"]), (batch, name)
            pairs = zip(one["logprobs"], two["logprobs"], strict=True)
            assert all(abs(a - b) <= BAND for a, b in pairs), (batch, name)


def test_receipts_agree(first, second):
    compared = 0
    for batch, expected in first["batches"].items():
        for name, one in expected.items():
            two = second["batches"][batch][name]
            if one["finish"] == "error" or one["tally"] is None:
                continue
            exact = ("prompt_tokens", "completion_tokens", "count", "heads", "skipped", "details")
            for field in exact:
                assert two["tally"][field] == one["tally"][field], (batch, name, field)
            assert two["tally"]["sums"] == pytest.approx(one["tally"]["sums"], rel=1e-3)
            compared += 1
    assert compared > 2 * len(REQUESTS)


def test_failures_fail_alone(second):
    batches = {name: each for name, each in second["batches"].items() if name.startswith("beside")}
    assert batches
    for batch, results in batches.items():
        for name, result in results.items():
            failed = name == batch.removeprefix("beside ")
            assert result["finish"] == ("error" if failed else "length"), (batch, name)


def test_a_step_that_came_too_late_to_stop_is_not_counted(first, second):
    for name, one in first["stopped"].items():
        two = second["stopped"][name]
        assert two == one, name
        assert two["completion_tokens"] == len(two["tokens"]) - 1 <= STOP
