"""Two tensor-parallel ranks give what one gives: answers, receipts, failures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fixtures import llama
from tests.integration import coupled, faulty
from tests.integration.oracle import Oracle
from tests.integration.serving import one_core_each
from tests.integration.sharded import COUPLED, FAULTS, REQUESTS, prompt

SECONDS = 300
# Summation in another order; the plain requests of the same prompts tell how much it does.
MARGIN = 4


def run(ranks: int, folder: Path, *models: Path) -> Any:
    """Results by model."""
    out = folder / f"{ranks}.json"
    plugins = coupled.install(folder) | faulty.install(folder)
    finished = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.integration.sharded",
            str(ranks),
            str(out),
            *map(str, models),
        ],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        cwd=Path(__file__).parents[2],
        env={**os.environ, **plugins, **one_core_each(ranks)},
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def models(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Key/value heads that two ranks divide, and one head that both of them hold."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "divided": llama.build(folder / "divided", model),
        "replicated": llama.build(folder / "replicated", model, kv_heads=1),
    }


@pytest.fixture(scope="module")
def two(models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    results = run(2, tmp_path_factory.mktemp("two"), *models.values())
    return {name: results[str(folder)] for name, folder in models.items()}


@pytest.fixture(scope="module")
def one(models, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = models["divided"]
    return run(1, tmp_path_factory.mktemp("one"), folder)[str(folder)]


def deviation(left: Any, right: Any) -> float:
    return max(abs(a - b) for a, b in zip(left["logprobs"], right["logprobs"], strict=True))


@pytest.mark.parametrize("batch", ["calibrated", "again"])
def test_answers_agree(one, two, batch):
    results = two["divided"]
    band = max(deviation(one["plain"][name], results["plain"][name]) for name in REQUESTS)
    for name in REQUESTS:
        single, double = one[batch][name], results[batch][name]
        assert double["tokens"] == single["tokens"], name
        assert double["cached"] == single["cached"], name
        assert deviation(single, double) <= MARGIN * band, name
        if name != "neutral":
            assert deviation(double, results["plain"][name]) > 100 * band, name


@pytest.mark.parametrize("batch", ["calibrated", "again"])
def test_receipts_agree(one, two, batch):
    for name, (length, _) in REQUESTS.items():
        single, double = one[batch][name]["tally"], two["divided"][batch][name]["tally"]
        assert double["prompt_tokens"] == single["prompt_tokens"] == length, name
        assert double["completion_tokens"] == single["completion_tokens"], name
        assert double["count"] == single["count"], name
        assert double["sums"] == pytest.approx(single["sums"], rel=1e-3), name


@pytest.mark.parametrize("batch", ["coupled", "coupled again"])
def test_methods_that_look_before_they_act_agree(one, two, batch):
    results = two["divided"]
    band = max(deviation(one["plain"][name], results["plain"][name]) for name in COUPLED)
    for name, (length, _) in COUPLED.items():
        single, double = one[batch][name], results[batch][name]
        assert double["tokens"] == single["tokens"], name
        assert deviation(single, double) <= MARGIN * band, name
        assert deviation(double, results["plain"][name]) > 100 * band, name
        tally, expected = double["tally"], single["tally"]
        # ACT counts the rows that it changes.
        acts = name.startswith("act")
        assert tally["prompt_tokens"] == (expected["prompt_tokens"] if acts else length) > 0, name
        assert tally["count"] == expected["count"] > 0, name
        assert tally["sums"] == pytest.approx(expected["sums"], rel=1e-3), name


def test_a_failure_on_either_rank_fails_its_request_alone(one, two):
    for results in (one, two["divided"], two["replicated"]):
        for fault in FAULTS:
            beside = results[f"beside {fault}"]
            assert beside.pop(fault)["finish"] == "error", fault
            for name, neighbour in beside.items():
                assert neighbour["finish"] == "length"
                assert neighbour["tokens"] == results["calibrated"][name]["tokens"]


def test_key_heads_that_every_rank_holds(two, models):
    results, oracle = two["replicated"], Oracle(models["replicated"])

    def error(batch: str, name: str, setting: dict[str, Any]) -> float:
        length = REQUESTS[name][0]
        answer = results[batch][name]
        sequence = [*prompt(list(REQUESTS).index(name), length), *answer["tokens"]]
        expected = oracle.log_probabilities(sequence, oracle.zerotuning(setting))[length - 1 :]
        return (torch.tensor(answer["logprobs"]) - expected).abs().max().item()

    band = max(error("plain", name, {"gamma": 1.0}) for name in REQUESTS)
    for name, (length, setting) in REQUESTS.items():
        assert error("calibrated", name, setting) <= MARGIN * band, name
        tally = results["calibrated"][name]["tally"]
        assert (tally["prompt_tokens"], tally["completion_tokens"]) == (length, 7), name
