"""`trimtab eval` from file to report, on a real server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from server import cli
from tests.integration.serving import Server

DATA = Path(__file__).parents[3] / "examples" / "data" / "topic.jsonl"
GAMMA = {"method": "zerotuning", "gamma": 0.3}


@pytest.fixture(scope="module")
def evaluate(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Eight samples plainly and with a calibration; status and results."""

    def run(*flags: str, calibration: object = GAMMA) -> tuple[int, Any]:
        out = tmp_path_factory.mktemp("eval")
        chosen = ["--calibration", json.dumps(calibration), "--limit", "8", *flags]
        where = ["--url", server.url, "--out", str(out)]
        status = cli.main(["eval", "--data", str(DATA), *where, *chosen])
        return status, json.loads((out / "results.json").read_text(encoding="utf-8"))

    return run


def test_choices_are_weighed(evaluate, name):
    status, results = evaluate()
    assert status == 0
    assert results["model"] == name
    baseline, calibrated = results["rows"]
    assert len(calibrated["digests"]) == 1
    for plain, tuned in zip(baseline["outcomes"], calibrated["outcomes"], strict=True):
        assert plain["receipts"] == []
        # Every token of the prompt was calibrated, and nothing was fed back.
        assert [receipt["tokens"] > 10 for receipt in tuned["receipts"]] == [True]
        assert plain["logprobs"].keys() == tuned["logprobs"].keys()
        assert max(plain["logprobs"].values()) < 0
        assert plain["logprobs"] != tuned["logprobs"]


def test_a_sum_over_several_tokens_is_that_of_the_whole_prompt(server, name, tmp_path):
    prompt, choices = "Question: what colour is the sky?\nAnswer:", [" light blue", " green"]
    sample = {"prompt": prompt, "answer": choices[0], "labels": choices, "split": "report"}
    file, out = tmp_path / "data.jsonl", tmp_path / "out"
    file.write_text(json.dumps(sample), encoding="utf-8")
    flags = ["--out", str(out), "--calibration", json.dumps(GAMMA)]
    assert cli.main(["eval", "--data", str(file), "--url", server.url, *flags]) == 0
    rows = json.loads((out / "results.json").read_text(encoding="utf-8"))["rows"]
    for row, calibration in zip(rows, ("none", GAMMA), strict=True):
        with server.client() as client:
            body = {
                "model": name,
                "prompt": prompt + choices[0],
                "max_tokens": 1,
                "prompt_logprobs": 0,
                "calibration": calibration,
            }
            (choice,) = client.post("/v1/completions", json=body).json()["choices"]
        logprobs = [next(iter(step.values()))["logprob"] for step in choice["prompt_logprobs"][-2:]]
        # Chunks of other sizes round differently in bfloat16.
        found = row["outcomes"][0]["logprobs"][choices[0]]
        assert found == pytest.approx(sum(logprobs), abs=0.1)


def test_answers_are_written_and_a_refusal_is_told(evaluate):
    flags = ["--scoring", "generate", "--max-tokens", "4"]
    status, results = evaluate(*flags, calibration={"method": "zerotuning", "layers": [99]})
    assert status == 1
    baseline, refused = results["rows"]
    assert all(outcome["text"] for outcome in baseline["outcomes"])
    assert "status 400: calibration." in refused["error"]
