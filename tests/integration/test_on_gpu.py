"""The embedded model on a GPU, its plain steps in full graphs and its calibrated ones in pieces."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SECONDS = 580
MARGIN = 4

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
]


# Each backend, and each model runner; asynchronous scheduling is vLLM's default.
ENGINES = [("FLASH_ATTN", "v2-async"), ("FLASH_ATTN", "v1"), ("TRITON_ATTN", "v2")]


def run(mode: str, engine: tuple[str, str], model: Path, folder: Path) -> Any:
    """Results of one engine; they run one after the other."""
    out = folder / f"{mode}.json"
    arguments = [mode, *engine, str(model), str(out)]
    finished = subprocess.run(
        [sys.executable, "-m", "tests.integration.on_gpu", *arguments],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRIMTAB_CALIBRATORS": "zerotuning"},
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module", params=ENGINES, ids=" ".join)
def results(request: Any, model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("-".join(request.param))
    return {mode: run(mode, request.param, model, folder) for mode in ("stock", "trimtab")}


@pytest.fixture(scope="module")
def oracle(model: Path) -> Any:
    from tests.integration.oracle import Oracle

    return Oracle(model)


def error(oracle: Any, kind: str, length: int, answer: Any) -> float:
    """The largest deviation of an answer's log-probabilities from dense float32 equations."""
    from tests.integration.on_gpu import BOUNDS, prompt

    bound = BOUNDS[kind]
    rewrite = oracle.zerotuning({"gamma": 1.0} if bound is None else bound.params)
    sequence = [*prompt(length), *answer["tokens"]]
    expected = oracle.log_probabilities(sequence, rewrite)[length - 1 :]
    return (torch.tensor(answer["logprobs"]) - expected).abs().max().item()


def test_plain_requests_are_bit_identical_to_stock(results):
    assert results["stock"]
    for name, answer in results["stock"].items():
        assert results["trimtab"][name] == answer, name


def test_calibrated_requests_are_as_near_to_the_reference_as_plain_ones(results, oracle):
    """In one batch; the plain ones tell how much bfloat16 does."""
    mixed = {name: each for name, each in results["trimtab"].items() if name.startswith("mixed")}
    errors: dict[str, list[float]] = {}
    for name, answer in mixed.items():
        kind, length = name.removeprefix("mixed: ").split()
        errors.setdefault(kind, []).append(error(oracle, kind, int(length), answer))
    assert max(errors["severe"] + errors["mild"]) <= MARGIN * max(errors["plain"]), errors


def test_calibration_changes_answers_and_counts_every_row(results):
    from tests.integration.on_gpu import LENGTHS, NEW_TOKENS

    ours = results["trimtab"]
    for length in LENGTHS:
        severe, plain = ours[f"mixed: severe {length}"], ours[f"mixed: plain {length}"]
        assert severe["logprobs"] != plain["logprobs"]
        assert severe["tally"][:2] == [length, NEW_TOKENS - 1]
        assert plain["tally"] is None
