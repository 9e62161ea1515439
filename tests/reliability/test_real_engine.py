"""The same ends with a real engine, and more requests than it can serve. `make reliability`."""

from __future__ import annotations

import logging
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import quantiles

import httpx
import psutil
import pytest

from tests.integration.serving import one_core_each, serving
from tests.reliability.callers import Callers

STREAMS = 32
# vLLM gives workers that are left six seconds to end before it tells anybody.
TOLD, ENDED = 8, 10
PLACES, MEASURED = 8, 30
CALIBRATION = {"method": "zerotuning", "gamma": 0.5}
logger = logging.getLogger(__name__)
pytestmark = [
    pytest.mark.long,
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.xdist_group("engine"),
]


@pytest.fixture
def start(embedded, tmp_path):
    """A context with a server of these flags."""

    def make(*flags: str, env: dict[str, str] | None = None):
        usual = ("--max-model-len", "2048", "--dtype", "float32")
        return serving(tmp_path / "log", *usual, *flags, env=env)

    return make


def under_load(server, max_tokens):
    """Half of them streamed, half calibrated; all of them generate."""
    callers = Callers(server, STREAMS)
    asked = [
        callers.ask(
            prompt=f"{index} ducks",
            max_tokens=max_tokens,
            stream=index % 2 == 0,
            calibration=CALIBRATION if index % 4 < 2 else None,
        )
        for index in range(STREAMS)
    ]
    while server.metric("vllm:num_requests_running") < STREAMS:
        assert not any(answer.done() for answer in asked)
        time.sleep(0.1)
    return callers, asked


@pytest.mark.parametrize(("victim", "ranks"), [("EngineCore", 1), ("Worker", 1), ("Worker_TP1", 3)])
def test_a_killed_process_ends_all_requests_and_the_server(start, victim, ranks):
    flags = ("--tensor-parallel-size", str(ranks))
    with start(*flags, env=one_core_each(ranks) if ranks > 1 else None) as server:
        callers, asked = under_load(server, 1500)
        children = psutil.Process(server.process.pid).children(recursive=True)
        (process,) = [each for each in children if each.cmdline()[0] == f"VLLM::{victim}"]
        killed = time.monotonic()
        process.send_signal(signal.SIGKILL)
        answers = [answer.result() for answer in asked]
        status = server.process.wait(60)
        seconds = time.monotonic() - killed
        _, left = psutil.wait_procs(children, 10)
        callers.close()
    told = max(answer.at for answer in answers) - killed
    logger.info(
        "%s of %d: last answer after %.1f s, end after %.1f s", victim, ranks, told, seconds
    )
    for answer in answers:
        assert answer.error["message"] == "the engine has died"
        assert answer.status == 500 or answer.done
    assert status == 1
    assert [each for each in left if each.status() != psutil.STATUS_ZOMBIE] == []
    assert told < TOLD
    assert seconds < ENDED


def test_streams_are_finished_after_a_signal(start):
    with start("--shutdown-timeout", "120") as server:
        callers, asked = under_load(server, 200)
        told = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert httpx.get(f"{server.url}/ready").status_code == 503
        with server.client() as client:
            refused = client.post("/v1/completions", json={"prompt": "one more"})
        answers = [answer.result() for answer in asked]
        assert server.process.wait(60) == 0
        callers.close()
    logger.info("%d streams ended %.1f s after the signal", STREAMS, time.monotonic() - told)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert all(answer.done and answer.error is None for answer in answers)


def goodput(server, clients):
    """Answers per second that so many clients get, what each refusal took, and probes' statuses."""
    until, refusals, answered, probes = time.monotonic() + MEASURED, [], [], []

    def ask(index):
        with server.client() as client:
            while time.monotonic() < until:
                began = time.monotonic()
                body = {"prompt": f"{index} ducks", "max_tokens": 16, "ignore_eos": True}
                response = client.post("/v1/completions", json=body)
                if response.status_code == 200:
                    answered.append(time.monotonic())
                    continue
                assert response.status_code == 503, response.text
                refusals.append(time.monotonic() - began)
                time.sleep(int(response.headers["Retry-After"]))

    def look():
        while time.monotonic() < until:
            probes.append(httpx.get(f"{server.url}/health", timeout=10).status_code)
            time.sleep(0.5)

    with ThreadPoolExecutor(clients + 1) as pool:
        looking = pool.submit(look)
        list(pool.map(ask, range(clients)))
        looking.result()
    return sum(moment < until for moment in answered) / MEASURED, refusals, probes


def test_more_requests_than_it_can_serve_cost_no_goodput(start):
    flags = ("--max-num-seqs", str(PLACES), "--max-queued-requests", str(PLACES))
    with start(*flags) as server:
        goodput(server, PLACES)
        rates = []
        for clients in (PLACES, 4 * PLACES, PLACES, 4 * PLACES):
            rate, refusals, probes = goodput(server, clients)
            rates.append(rate)
            slow = quantiles(refusals, n=100)[-1] * 1000 if len(refusals) > 1 else 0.0
            shown = (clients, rate, len(refusals), slow)
            logger.info("%d clients: %.2f answers/s, %d refused, p99 %.0f ms", *shown)
            assert set(probes) == {200}
            assert bool(refusals) == (clients > 2 * PLACES)
    assert rates[1] + rates[3] >= 0.9 * (rates[0] + rates[2])
