"""Calibrated log-probabilities against an eager Hugging Face forward, in float32.

All requests of a test are in flight together, with plain ones among them, so that batches are
mixed, prompts are chunked beside decoding neighbours and the small KV cache forces preemption.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.integration.attempts import in_time
from tests.integration.oracle import Oracle, plain
from tests.integration.profiles import write_profile
from tests.integration.sequences import Text, log_probabilities
from tests.integration.serving import Server, serving

SETTINGS: list[dict[str, Any] | None] = [
    None,
    {"gamma": 0.3},
    {"gamma": 0.6},
    {"gamma": 1.0},
    {"gamma": 2.0},
    {"gamma": 6.5},
    {"gamma": 20, "heads": [1, 5]},
    {"gamma": 0.01, "layers": [0]},
    {"gamma": 3.0, "layers": [5, 11, 29]},
    {"gamma": 0.4, "heads": [0, 4, 8]},
    {"gamma": 2.5, "layers": [0, 1, 2, 28], "heads": [3]},
    {"gamma": 0.5, "heads": {"0": [0], "7": [1, 2, 8], "29": [0, 1, 2, 3, 4, 5, 6, 7, 8]}},
    {"profile": "by-head"},
]
STRENGTHS = {
    str(layer): {str(head): round(0.2 + 0.37 * ((layer + 2 * head) % 7), 2) for head in heads}
    for layer, heads in {0: [0, 1, 2], 3: [5], 11: range(9), 29: [8, 3]}.items()
}
LENGTHS = [1, 2, 17, 63, 64, 65, 128, 200, 311, 600]
NEW_TOKENS = 12
TOLERANCE = 1e-3

CHUNKED = ("--max-num-batched-tokens", "64", "--block-size", "32", "--max-num-seqs", "16")
WHOLE = ("--max-num-batched-tokens", "2048", "--max-num-seqs", "16")


CUTS = {"chunks of 64": CHUNKED, "whole prompts": WHOLE}


@pytest.fixture(scope="module", params=CUTS.values(), ids=CUTS)
def server(request: Any, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    # 1,600 positions of 32-token blocks: less than the concurrent requests need.
    cache = ("--num-gpu-blocks-override", "50") if request.param is CHUNKED else ()
    profiles = write_profile(log.parent / "profiles", model, "by-head", strengths=STRENGTHS)
    flags = ("--dtype", "float32", "--max-model-len", "1024", "--calibration-profiles", profiles)
    with serving(log, *map(str, flags), *request.param, *cache) as s:
        yield s


@pytest.fixture(scope="module")
def oracle(model: Path) -> Oracle:
    return Oracle(model)


@pytest.fixture(scope="module")
def text(model: Path) -> Text:
    return Text(model)


def prompts(text: Text, seed: int) -> list[list[int]]:
    """One of every length."""
    draw = random.Random(seed)
    return [text.prompt(draw, length) for length in LENGTHS]


def complete(server: Server, tokens: list[int], setting: dict[str, Any] | None, n: int) -> Any:
    body: dict[str, Any] = {
        "model": "smollm2-135m-instruct",
        "prompt": tokens,
        "max_tokens": n,
        "temperature": 0,
        "logprobs": 0,
        "prompt_logprobs": 0,
        "return_token_ids": True,
        "ignore_eos": True,
    }
    if setting is not None:
        body["calibration"] = {"method": "zerotuning", **setting}
    with server.client() as client:
        response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def check(server: Server, oracle: Oracle, cases: list[tuple[list[int], Any]], n: int) -> float:
    """Run all cases at once; the largest deviation from the oracle."""
    with ThreadPoolExecutor(len(cases)) as pool:
        answers = list(pool.map(lambda case: complete(server, *case, n), cases))
    worst = 0.0
    for (tokens, setting), answer in zip(cases, answers, strict=True):
        sequence, measured = log_probabilities(answer, tokens)
        known = {"strengths": STRENGTHS} if setting == {"profile": "by-head"} else setting
        rewrite = plain if known is None else oracle.zerotuning(known)
        expected = oracle.log_probabilities(sequence, rewrite)
        deviation = (measured - expected).abs().max().item()
        assert deviation < TOLERANCE, (len(tokens), setting, deviation)
        worst = max(worst, deviation)
        if setting is None:
            assert "calibration" not in answer
        else:
            applied = answer["calibration"]["applied"][0]
            assert applied["prompt_tokens"] == len(tokens)
            assert applied["completion_tokens"] == n - 1
    return worst


# Each round has every setting once; over the rounds a setting meets a third of the lengths.
@pytest.mark.parametrize("shift", [0, 3, 6])
def test_all_settings_at_once(server, oracle, text, shift, record_property):
    lengths = len(LENGTHS)
    cases = [
        (prompts(text, shift)[(index + shift) % lengths], setting)
        for index, setting in enumerate(SETTINGS)
    ]
    record_property("deviation", check(server, oracle, cases, NEW_TOKENS))


@pytest.mark.long
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_every_setting_on_every_length(server, oracle, text, setting, record_property):
    neighbours = [None, {"gamma": 0.7, "layers": [2, 3]}]
    cases = [(tokens, setting) for tokens in prompts(text, SETTINGS.index(setting))]
    cases += [(prompts(text, 99)[i], neighbours[i % 2]) for i in (2, 3, 5, 6)]
    record_property("deviation", check(server, oracle, cases, NEW_TOKENS))


# The other server's KV cache has room for everybody.
@pytest.mark.parametrize("server", [CHUNKED], ids=["chunks of 64"], indirect=True)
def test_preempted_requests_are_exact(server, oracle, text):
    def attempt(number: int) -> bool:
        before = server.metric("vllm:num_preemptions_total")
        draw = random.Random(7 + number)
        cases = [(text.prompt(draw, 90 + 5 * i), SETTINGS[i % len(SETTINGS)]) for i in range(12)]
        check(server, oracle, cases, 100)
        return server.metric("vllm:num_preemptions_total") > before

    in_time(attempt)
