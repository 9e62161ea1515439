"""Several API server processes in front of one engine answer as one would."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.integration import slow
from tests.integration.plugins import install
from tests.integration.profiles import write_profile
from tests.integration.serving import START_SECONDS, Server, serving

PROCESSES = 2
# Connections are spread by chance: all to one process once in half a million.
CONNECTIONS = 20
MILD, STRONG = ({"method": "zerotuning", "gamma": gamma} for gamma in (0.7, 5))


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    env = install(folder, "slow", Path(slow.__file__).read_text(), slow.ENTRY_POINTS)
    env["SLOW"] = str(slow_file(folder / "log"))
    flags = ["--api-server-count", str(PROCESSES), "--max-model-len", "1024"]
    flags += ["--enable-prompt-tokens-details", "--shutdown-timeout", "120"]
    profiles = write_profile(folder / "profiles", model, "mild", parameters={"gamma": 0.7})
    flags += ["--calibration-profiles", str(profiles)]
    with serving(folder / "log", *flags, env=env) as running:
        wait_for_every_process(running)
        yield running


def slow_file(log: Path) -> Path:
    """While it is there, steps of the server that writes `log` take a second."""
    return log.with_name("slow-steps")


def wait_for_every_process(server: Server) -> None:
    """The first process answers before the others listen."""
    deadline = time.monotonic() + START_SECONDS
    while len(holders(server)) < PROCESSES:
        assert time.monotonic() < deadline, "one process takes all connections"


def holders(server: Server) -> set[int]:
    """Processes that hold some of a number of new connections."""
    with ExitStack() as stack:
        for _ in range(CONNECTIONS):
            stack.enter_context(server.client()).get("/health")
        return {
            child.pid
            for child in psutil.Process(server.process.pid).children(recursive=True)
            for connection in child.net_connections("tcp")
            if connection.status == psutil.CONN_ESTABLISHED
            and connection.laddr.port == httpx.URL(server.url).port
        }


@pytest.fixture(scope="module")
def clients(server: Server) -> Iterator[list[httpx.Client]]:
    """Clients, each with connections of its own."""
    with ExitStack() as stack:
        yield [stack.enter_context(server.client()) for _ in range(CONNECTIONS)]


def complete(client: httpx.Client, calibration: Any, tokens: int = 3) -> Any:
    body = {
        "prompt": [500 + i * 3 for i in range(300)],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "calibration": calibration,
    }
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def cached(answer: Any) -> int:
    tokens: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return tokens


def test_blocks_are_shared_between_equal_settings_whoever_answers(clients):
    for calibration in (MILD, None, STRONG):
        answers = [complete(client, calibration) for client in clients]
        assert [cached(answer) for answer in answers] == [0] + [256] * (CONNECTIONS - 1)
        # The first computed what the others found.
        assert len({answer["choices"][0]["text"] for answer in answers[1:]}) == 1


def test_receipts_come_from_every_process(clients):
    receipts = [complete(client, MILD)["calibration"] for client in clients]
    assert len({receipt["digest"] for receipt in receipts}) == 1
    counts = {
        (entry["prompt_tokens"], entry["completion_tokens"])
        for receipt in receipts
        for entry in receipt["applied"]
    }
    assert counts == {(300, 2)}


def test_every_process_has_the_profiles(server, clients):
    profiled = {"method": "zerotuning", "profile": "mild"}
    digests = {complete(client, profiled)["calibration"]["digest"] for client in clients}
    assert digests == {complete(clients[0], MILD)["calibration"]["digest"]}
    assert server.metric("trimtab_profile_loads_total", outcome="loaded") == 1


def test_metrics_are_sums_over_all_processes_whoever_is_asked(server, clients):
    before = server.metric("trimtab_requests_total", outcome="applied")
    for client in clients:
        complete(client, MILD)
    name = 'trimtab_requests_total{calibrator="zerotuning",outcome="applied"}'
    for client in clients:
        lines = client.get("/metrics").text.splitlines()
        assert f"{name} {before + CONNECTIONS}" in lines
        assert 'trimtab_active_requests{calibrator="zerotuning"} 0.0' in lines
        assert sum(line.startswith("trimtab_build_info{") for line in lines) == 1


def test_running_requests_are_finished_at_shutdown(server, clients):
    """Last: the server is gone afterwards. A minute of slow steps is left at the signal."""
    slow_steps = slow_file(server.log)
    slow_steps.touch()
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        running = [pool.submit(complete, client, MILD, 64) for client in clients]
        while server.metric("vllm:num_requests_running") < CONNECTIONS:
            assert not any(answer.done() for answer in running)
            time.sleep(0.1)
        server.process.send_signal(signal.SIGTERM)
        slow_steps.unlink()
        for answer in running:
            assert answer.result()["calibration"]["applied"][0]["completion_tokens"] == 63
    assert server.process.wait(60) == 0
