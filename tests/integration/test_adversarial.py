"""Everything vLLM does to a batch at once: every surviving answer equals its own solo run.

48 requests with 12 settings, prompts of 1 to 900 tokens in chunks of 64, a KV cache too small for
them, so that requests are preempted and recomputed, and clients that hang up.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.integration.attempts import in_time
from tests.integration.serving import Server, serving
from tests.integration.state.calls import wait_until_idle

REQUESTS = 48
ABORTED = 8
NEW_TOKENS = 16
# Of every fifth request: it outgrows its blocks several times, and new prompts take all there are.
MANY_NEW_TOKENS = 96
# A fifth of the requests is plain.
SETTINGS: list[dict[str, Any] | None] = [
    None,
    None,
    None,
    {"gamma": 0.2},
    {"gamma": 0.5},
    {"gamma": 3},
    {"gamma": 0.1, "layers": [0, 1]},
    {"gamma": 10, "layers": [14]},
    {"gamma": 0.7, "heads": [2, 5]},
    {"gamma": 4, "heads": {"3": [0], "20": [1, 2]}},
    {"gamma": 1},
    {"gamma": 2, "layers": [28, 29], "heads": [8]},
    {"gamma": 1.7},
    {"gamma": 0.3, "layers": [3, 11, 19], "heads": [0, 1, 2]},
    {"gamma": 6, "heads": {"7": [4, 5, 6], "8": [3]}},
]


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    flags = ["--dtype", "float32", "--max-model-len", "1024", "--max-num-batched-tokens", "64"]
    flags += ["--block-size", "32", "--num-gpu-blocks-override", "36", "--max-num-seqs", "24"]
    with serving(log, *flags) as running:
        yield running


@pytest.fixture(scope="module")
def requests(model: Path) -> list[dict[str, Any]]:
    """Bodies; stretches of real text from random places."""
    draw = random.Random(11)
    tokenizer = AutoTokenizer.from_pretrained(model)
    licence = (Path(__file__).parents[2] / "LICENSE").read_text()
    text = tokenizer(licence)["input_ids"]
    bodies = []
    for index in range(REQUESTS):
        length = draw.choice([1, 2, 31, 32, 33, 64, 65, 200, 400, 900, draw.randrange(3, 900)])
        start = draw.randrange(len(text) - length)
        setting = SETTINGS[index % len(SETTINGS)]
        bodies.append(
            {
                "prompt": text[start : start + length],
                "max_tokens": NEW_TOKENS if index % 5 else MANY_NEW_TOKENS,
                "temperature": 0,
                "ignore_eos": True,
                "logprobs": 0,
                "return_token_ids": True,
                "calibration": setting and {"method": "zerotuning", **setting},
            }
        )
    return bodies


def complete(server: Server, body: dict[str, Any]) -> Any:
    with server.client() as client:
        response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def hang_up(server: Server, body: dict[str, Any], after: int) -> None:
    """Leave a stream after some events."""
    with (
        server.client() as client,
        client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response,
    ):
        for count, _ in enumerate(response.iter_lines()):
            if count >= after:
                return


def test_surviving_answers_equal_solo_runs(server, requests):
    solo = [complete(server, body) for body in requests]
    in_time(lambda number: check_together(server, requests, solo, random.Random(5 + number)))


def check_together(server: Server, requests: list[Any], solo: list[Any], draw: Any) -> bool:
    """Run them all at once; whether some were preempted."""
    before = server.metric("vllm:num_preemptions_total")
    aborted = set(draw.sample(range(REQUESTS), ABORTED))
    order = draw.sample(range(REQUESTS), REQUESTS)
    salt = f"together-{draw.random()}"

    def run(index: int) -> Any:
        if index in aborted:
            return hang_up(server, requests[index], after=draw.randrange(2, 12))
        # A salt of its own: nothing comes out of the cache but what preemption left there.
        return complete(server, {**requests[index], "cache_salt": f"{salt}-{index}"})

    with ThreadPoolExecutor(REQUESTS) as pool:
        together = dict(zip(order, pool.map(run, order), strict=True))
    preempted = server.metric("vllm:num_preemptions_total") - before
    for index in sorted(set(range(REQUESTS)) - aborted):
        alone, beside = solo[index]["choices"][0], together[index]["choices"][0]
        label = (index, len(requests[index]["prompt"]), requests[index]["calibration"])
        assert beside["token_ids"] == alone["token_ids"], label
        assert beside["logprobs"]["token_logprobs"] == pytest.approx(
            alone["logprobs"]["token_logprobs"], abs=1e-3
        ), label
        receipts = [answer.get("calibration") for answer in (solo[index], together[index])]
        if requests[index]["calibration"] is None:
            assert receipts == [None, None]
            continue
        counts = [
            (r["applied"][0]["prompt_tokens"], r["applied"][0]["completion_tokens"])
            for r in receipts
        ]
        expected = len(requests[index]["prompt"]), requests[index]["max_tokens"] - 1
        assert counts == [expected, expected], label
    # The last to hang up may have been the last to run.
    wait_until_idle(server)
    return preempted > 0
