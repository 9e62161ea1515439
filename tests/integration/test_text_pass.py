"""What a text pass is to a client: nothing. Its numbers are in `test_vision.py`."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.fixtures import llava
from tests.integration.serving import Server, serving
from tests.integration.vision_cases import Conversation, picture

VHR = {"method": "vhr", "layers": "all"}
QUESTIONS = ["What is it?", "Who may use the work, and where?", "Name the notice.", "Why."]
FLAGS = ["--served-model-name", "llava", "--dtype", "float32", "--max-model-len", "512"]
FLAGS += ["--block-size", "32", "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(5 << 20)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("llava")
    model = llava.build(folder / "model")
    with serving(folder / "log", str(model), *FLAGS) as running:
        yield running


def body(question: str, wanted: Any, **fields: Any) -> dict[str, Any]:
    messages = Conversation((((picture(1, 3),), question),)).messages
    usual = {"max_tokens": 6, "temperature": 0, "ignore_eos": True, "calibration": wanted}
    return {"messages": messages} | usual | fields


def ask(server: Server, question: str, wanted: Any, **fields: Any) -> Any:
    with server.client() as client:
        response = client.post("/v1/chat/completions", json=body(question, wanted, **fields))
    assert response.status_code == 200, response.text
    return response.json()


def heads(answer: Any) -> Any:
    (entry,) = answer["calibration"]["applied"]
    return entry["statistics"]["heads_selected"]


class Counted:
    """Requests and prompt tokens that metrics count within a block."""

    NAMES = ("trimtab_requests_total", "vllm:prompt_tokens_total")

    def __init__(self, server: Server) -> None:
        self._server = server

    def __enter__(self) -> Counted:
        self._before = [self._server.metric(name) for name in self.NAMES]
        return self

    def __exit__(self, *_: object) -> None:
        after = [self._server.metric(name) for name in self.NAMES]
        self.requests, self.tokens = (b - a for a, b in zip(self._before, after, strict=True))


@pytest.mark.parametrize("n", [1, 3])
def test_a_prompt_runs_once_without_its_image_and_nobody_sees_it(server, n):
    sampled = {"n": n, "temperature": 1.0, "seed": 5}
    with Counted(server) as plain:
        usual = ask(server, QUESTIONS[0], None, **sampled)
    with Counted(server) as counted:
        answer = ask(server, QUESTIONS[0], VHR, **sampled)
    assert answer["usage"] == usual["usage"]
    assert (plain.requests, counted.requests) == (0, 1)
    text = usual["usage"]["prompt_tokens"] - llava.IMAGE_TOKENS
    assert counted.tokens - plain.tokens == text
    (entry,) = answer["calibration"]["applied"]
    found = [entry] if n == 1 else entry["choices"]
    assert len(found) == n
    assert {each["completion_tokens"] for each in found} == {5}
    assert len({json.dumps(each["statistics"]["heads_selected"]) for each in found}) == 1


def test_requests_at_the_same_time_are_told_apart(server):
    alone = [heads(ask(server, question, VHR)) for question in QUESTIONS]
    assert len({json.dumps(each) for each in alone}) > 1
    many = QUESTIONS * 4
    with ThreadPoolExecutor(len(many)) as pool:
        found = list(pool.map(lambda question: heads(ask(server, question, VHR)), many))
    assert found == alone * 4


def test_a_stream_is_the_answer(server):
    whole = ask(server, QUESTIONS[1], VHR)
    fields = {"stream": True, "stream_options": {"include_usage": True}}
    with server.client() as client:
        response = client.post("/v1/chat/completions", json=body(QUESTIONS[1], VHR, **fields))
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    chunks = [json.loads(line) for line in lines]
    parts = [choice["delta"].get("content") for chunk in chunks for choice in chunk["choices"]]
    assert "".join(part or "" for part in parts) == whole["choices"][0]["message"]["content"]
    usage = {name: tokens for name, tokens in whole["usage"].items() if tokens is not None}
    assert chunks[-1]["usage"] == usage
    (receipt,) = [chunk["calibration"] for chunk in chunks if "calibration" in chunk]
    assert receipt == whole["calibration"]


async def hang_up(server: Server, seconds: float) -> None:
    request = body(QUESTIONS[2], VHR, stream=True, max_tokens=300)
    async with httpx.AsyncClient(verify=False, trust_env=False) as client:
        with pytest.raises(TimeoutError):
            url = f"{server.url}/v1/chat/completions"
            await asyncio.wait_for(client.post(url, json=request), seconds)


def test_who_hangs_up_leaves_nothing_behind(server):
    for seconds in (0.01, 0.02, 0.03, 0.05, 0.1, 0.2):
        asyncio.run(hang_up(server, seconds))
    deadline = time.monotonic() + 60
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "trimtab_active_requests")
    while any(server.metric(name) for name in names) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [server.metric(name) for name in names] == [0, 0, 0]
    assert heads(ask(server, QUESTIONS[2], VHR))


def test_what_was_let_in_is_answered_at_shutdown(server):
    """Text passes and the requests behind them, wherever the signal finds them."""
    outcomes: list[Any] = []

    def keep_asking(index: int) -> None:
        with server.client() as client:
            while not outcomes or outcomes[-1] == 200:
                request = body(QUESTIONS[index % 4], VHR, max_tokens=2)
                try:
                    response = client.post("/v1/chat/completions", json=request)
                except httpx.TransportError as error:
                    outcomes.append(type(error))
                    return
                outcomes.append(response.status_code)
                assert response.status_code != 200 or heads(response.json())

    threads = [threading.Thread(target=keep_asking, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    while len(outcomes) < 12:
        time.sleep(0.01)
    server.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(60)
    assert server.process.wait(60) == 0
    assert outcomes.count(200) >= 12
    assert set(outcomes) <= {200, 503, httpx.ConnectError}, outcomes
