"""Prompts are cut as their methods need it, as the engine's own scheduler writes it down.

Steps are short and the KV cache is small: prompts take turns, and requests are preempted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.integration import policies
from tests.integration.attempts import in_time
from tests.integration.plugins import install
from tests.integration.serving import Server, serving

STEP = 64
BLOCK = 32
NEW_TOKENS = 32
# In the order in which they are sent: the last to run are the first to be preempted.
LENGTHS: list[tuple[str | None, list[int]]] = [
    (None, [8, 20, 150, 200]),
    ("split", [130, 65, 64, 2, 1]),
    ("whole", [STEP, 63, STEP, 40, 1]),
]


class Recorded(Server):
    """A server whose scheduling is on record."""

    steps_file: Path

    def chunks(self, name: str) -> list[tuple[int, int, int]]:
        """(step, first position, tokens) of the chunks of a request, copies included."""
        lines = self.steps_file.read_text().splitlines()
        return [
            (step, start, size)
            for step, line in enumerate(lines)
            for request, (start, size) in json.loads(line).items()
            if f"-{name}-" in request
        ]


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    folder = tmp_path_factory.mktemp("policies")
    source = Path(policies.__file__).read_text()
    env = install(folder, "policies", source, policies.ENTRY_POINTS)
    env["SCHEDULED"] = str(folder / "steps")
    flags = ["--calibrators", "zerotuning,whole,split,acausal", "--dtype", "float32"]
    flags += ["--max-model-len", "512", "--max-num-batched-tokens", str(STEP)]
    flags += ["--block-size", str(BLOCK), "--num-gpu-blocks-override", "20"]
    with serving(folder / "log", *flags, "--max-num-seqs", "12", env=env) as running:
        recorded = Recorded(running.url, running.process, running.log)
        recorded.steps_file = folder / "steps"
        yield recorded


def prompt(seed: int, length: int) -> list[int]:
    return [500 + (seed * 7919 + i * i * 31) % 40000 for i in range(length)]


def complete(
    server: Server, name: str, tokens: list[int], method: str | None, **fields: Any
) -> Any:
    body = {
        "prompt": tokens,
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 0,
        "request_id": name,
        "calibration": method and {"method": method, "gamma": 0.3},
        **fields,
    }
    with server.client() as client:
        return client.post("/v1/completions", json=body)


def jobs() -> list[tuple[str, list[int], str | None]]:
    return [
        (f"{method}{index}", prompt(10 * kind + index, length), method)
        for kind, (method, lengths) in enumerate(LENGTHS)
        for index, length in enumerate(lengths)
    ]


def test_prompts_are_cut_as_asked_among_others_and_answers_do_not_change(server):
    batch = jobs()
    alone = {name: complete(server, f"alone_{name}", *rest).json() for name, *rest in batch}
    in_time(
        lambda number: check_together(
            server, alone, [(f"{number}_{name}", *rest) for name, *rest in batch]
        )
    )


def check_together(server, alone, batch) -> bool:
    """Run them all at once; whether a whole prompt was preempted and came again."""
    with ThreadPoolExecutor(len(batch)) as pool:
        # A salt of its own: nothing comes out of the cache but what preemption left there.
        answers = list(pool.map(lambda job: complete(server, *job, cache_salt=job[0]), batch))
    again = 0
    for (name, tokens, method), answer in zip(batch, answers, strict=True):
        chunks = server.chunks(name)
        starts = [start for _, start, _ in chunks]
        again += method == "whole" and starts.count(0) > 1
        for _, start, size in chunks:
            if method == "whole":
                assert start >= len(tokens) or (start == 0 and size >= len(tokens)), name
            if method == "split":
                last = len(tokens) - 1
                assert start >= last or start + size <= last, name
        one, other = alone[name.split("_")[1]]["choices"][0], answer.json()["choices"][0]
        assert other["text"] == one["text"], name
        assert other["logprobs"]["token_logprobs"] == pytest.approx(
            one["logprobs"]["token_logprobs"], abs=1e-3
        ), name
        if method is not None:
            (entry,) = answer.json()["calibration"]["applied"]
            counts = entry["prompt_tokens"], entry["completion_tokens"]
            assert counts == (len(tokens), NEW_TOKENS - 1), name
    return again > 0


def test_a_prompt_as_long_as_a_step_comes_while_others_run(server):
    def attempt(number: int) -> bool:
        busy = [f"busy{number}_{index}" for index in range(3)]
        with ThreadPoolExecutor(3) as pool:
            running = [
                pool.submit(complete, server, name, prompt(i, 4), None, max_tokens=120)
                for i, name in enumerate(busy)
            ]
            while len(server.chunks(busy[2])) < 10:
                time.sleep(0.05)
            between = f"between{number}"
            whole = complete(server, between, prompt(9, STEP), "whole", max_tokens=2)
            assert whole.status_code == 200
            assert [answer.result().status_code for answer in running] == [200] * 3
        first, *_ = server.chunks(between)
        assert first[1:] == (0, STEP)
        steps = [step for step, _, _ in server.chunks(busy[0])]
        assert max(after - before for before, after in pairwise(steps)) <= 2
        # Else the others had ended before it came.
        return steps[0] < first[0] < steps[-1]

    in_time(attempt)


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"n": 2, "temperature": 1}])
def test_a_prompt_that_never_fits_is_refused(server, fields):
    answer = complete(server, "long", prompt(1, STEP + 1), "whole", **fields)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("calibration", "invalid_calibration")
    for said in (f"{STEP + 1} tokens", f"takes {STEP}", "--max-num-batched-tokens"):
        assert said in error["message"]
    assert server.chunks("long") == []


def test_one_long_prompt_of_several_refuses_all(server):
    prompts = [prompt(1, 8), prompt(2, STEP + 1)]
    answer = complete(server, "several", prompts, "whole")
    assert answer.status_code == 400
    assert server.chunks("several") == []
    assert server.metric("trimtab_active_requests") == 0


def test_a_chat_that_never_fits_is_refused(server):
    body = {
        "messages": [{"role": "user", "content": "word " * 100}],
        "calibration": [{"method": "whole", "gamma": 0.3}],
    }
    with server.client() as client:
        answer = client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "calibration[0]"
        body["messages"][0]["content"] = "word"
        assert client.post("/v1/chat/completions", json=body | {"max_tokens": 2}).status_code == 200


@pytest.mark.parametrize(("seed", "method"), [(51, "whole"), (52, "acausal"), (53, "split")])
def test_cached_kv_is_shared_with_nobody(server, seed, method):
    tokens = prompt(seed, 2 * BLOCK)
    order = [method, method, None, method, None]
    starts = []
    for index, each in enumerate(order):
        name = f"{method}_cache{index}"
        complete(server, name, tokens, each, max_tokens=2, cache_salt="mine")
        starts.append(server.chunks(name)[0][1])
    # The last plain one finds the blocks of the first, which shows that there is a cache.
    assert starts == [0, 0, 0, 0, BLOCK]


@pytest.mark.parametrize("method", ["whole", "acausal"])
def test_copies_of_a_request_do_not_read_each_others_blocks(server, method):
    name = f"{method}_copies"
    answer = complete(server, name, prompt(70, STEP), method, n=3, temperature=1, max_tokens=2)
    assert answer.status_code == 200
    firsts = [start for _, start, size in server.chunks(name) if size > 1]
    assert firsts == [0] * len(firsts)
    assert len(firsts) >= 3
    (entry,) = answer.json()["calibration"]["applied"]
    assert [choice["prompt_tokens"] for choice in entry["choices"]] == [STEP] * 3
