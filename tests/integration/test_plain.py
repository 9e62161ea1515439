"""Plain requests are bit-identical to an engine without the plug-in, and nobody's failure shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.faulty import install

SECONDS = 300


def run(mode: str, model: Path, folder: Path, env: dict[str, str]) -> Any:
    out = folder / f"{mode}.json"
    finished = subprocess.run(
        [sys.executable, "-m", "tests.integration.offline", mode, str(model), str(out)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        cwd=Path(__file__).parents[2],
        env={**os.environ, **env},
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def results(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results by engine and request; the engines run one after the other."""
    folder = tmp_path_factory.mktemp("offline")
    env = install(folder) | {
        "TRIMTAB_CALIBRATORS": "zerotuning,faulty",
        # All requests of a batch are there before its first step, however busy the machine is.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    return {mode: run(mode, model, folder, env) for mode in ("stock", "trimtab")}


@pytest.mark.parametrize("name", ["alone", "short alone"])
def test_alone(results, name):
    assert results["trimtab"][name] == results["stock"][name]


@pytest.mark.parametrize("name", ["first", "second", "third"])
def test_beside_calibrated_neighbours(results, name):
    assert results["trimtab"][name] == results["stock"][name]


def test_neighbours_were_calibrated(results):
    for name in ("severe neighbour", "severe short neighbour", "mild neighbour"):
        ours, stock = results["trimtab"][name], results["stock"][name]
        assert ours["logprobs"] != stock["logprobs"]


def test_after_a_calibrated_one_on_the_same_prompt(results):
    ours, stock = results["trimtab"], results["stock"]
    assert ours["after severe"] == stock["after severe"]
    assert ours["after severe"]["cached"] == 0
    assert ours["plain again"] == stock["plain again"]
    assert ours["plain again"]["cached"] == 256


def test_equal_settings_share_cached_blocks_and_others_do_not(results):
    ours = results["trimtab"]
    assert ours["severe again"]["cached"] == 256
    assert ours["severe again"]["tokens"] == ours["before plain"]["tokens"]
    assert ours["mild on the same prompt"]["cached"] == 0
    assert ours["before plain"]["logprobs"] != ours["after severe"]["logprobs"]


def test_a_result_that_is_not_finite_changes_no_bit_of_the_other_31(results):
    ours = results["trimtab"]
    assert (ours["sound"]["finished"], ours["failing"]["finished"]) == ("length", "error")
    beside = [name for name in ours if name.startswith("failing ")]
    assert len(beside) == 31
    for name in beside:
        assert ours[name] == ours[name.replace("failing", "sound")]
        assert (ours[name]["finished"], ours[name]["cached"]) == ("length", 0)
