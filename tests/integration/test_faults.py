"""A calibrator that computes nonsense fails its own request and nobody else's."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.integration.faulty import install
from tests.integration.serving import Server, serving

NEIGHBOURS = 31


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("plugin")
    # float32: batches over HTTP are not composed alike twice, and rounding depends on it.
    flags = ["--calibrators", "zerotuning,faulty", "--max-model-len", "1024", "--dtype", "float32"]
    with serving(folder / "log", *flags, env=install(folder)) as running:
        yield running


def complete(server: Server, index: int, calibration: Any, **fields: Any) -> Any:
    body = {
        "prompt": [500 + (index * 37 + i * i) % 40000 for i in range(64)],
        "max_tokens": 24,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 0,
        "calibration": calibration,
        **fields,
    }
    with server.client() as client:
        return client.post("/v1/completions", json=body)


def neighbours(server: Server) -> list[Any]:
    setting = {"method": "zerotuning", "gamma": 0.5}
    return [(i, setting if i % 2 else None) for i in range(NEIGHBOURS)]


def test_a_result_that_is_not_finite_fails_its_request_alone(server):
    faulty = {"method": "faulty", "gamma": 2}
    jobs = neighbours(server)

    def together(first: Any) -> list[Any]:
        with ThreadPoolExecutor(NEIGHBOURS + 1) as pool:
            return list(pool.map(lambda job: complete(server, *job), [first, *jobs]))

    # The same batch twice, once with a sound request in the faulty one's place.
    sound = together((99, {"method": "zerotuning", "gamma": 2}))
    before = server.metric("trimtab_requests_total", calibrator="faulty", outcome="failed")
    mixed = together((99, faulty))
    assert [answer.status_code for answer in sound] == [200] * (NEIGHBOURS + 1)
    assert mixed[0].status_code == 500
    assert set(mixed[0].json()["error"]) == {"message", "type", "param", "code"}
    assert [answer.status_code for answer in mixed[1:]] == [200] * NEIGHBOURS
    for expected, got in zip(sound[1:], mixed[1:], strict=True):
        assert got.json()["choices"][0]["text"] == expected.json()["choices"][0]["text"]
    after = server.metric("trimtab_requests_total", calibrator="faulty", outcome="failed")
    assert after == before + 1
    assert server.metric("trimtab_active_requests") == 0


def test_a_stream_ends_with_an_error_event(server):
    answer = complete(server, 99, {"method": "faulty", "gamma": 2}, stream=True)
    events = [line for line in answer.text.splitlines() if line.startswith("data: ")]
    assert '"error"' in events[-2]
    assert events[-1] == "data: [DONE]"
    assert 'calibration":' not in answer.text


def test_a_calibrator_that_raises_fails_its_request_alone(server):
    answer = complete(server, 99, {"method": "faulty", "gamma": 99})
    assert answer.status_code == 500
    assert "on purpose" not in answer.text
    assert complete(server, 99, {"method": "zerotuning", "gamma": 2}).status_code == 200


def test_failed_requests_leave_no_cached_blocks(server):
    faulty = {"method": "faulty", "gamma": 2}
    prompt = [700 + i * 3 for i in range(300)]
    for _ in range(2):
        answer = complete(server, 0, faulty, prompt=prompt)
        assert answer.status_code == 500
    assert complete(server, 0, None, prompt=prompt).status_code == 200
