"""The engine dies, the server is told to go: what clients and whoever started it see."""

from __future__ import annotations

import logging
import signal
import socket
import time
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from tests.integration.serving import serving
from tests.reliability.callers import Callers
from tests.reliability.conftest import program
from tests.reliability.core import HELD, PACED

STREAMS = 32
# What the end of a server may take, beyond what it was given for a drain.
SECONDS = 10
CUT_SECONDS = 4
CALIBRATION = {"method": "zerotuning", "gamma": 0.5}
logger = logging.getLogger(__name__)
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("engine")]


@pytest.fixture
def server(embedded, tmp_path):
    flags = ["--max-model-len", "2048", "--shutdown-timeout", str(CUT_SECONDS)]
    with serving(tmp_path / "log", *flags, program=program) as running:
        yield running


@pytest.fixture
def callers(server):
    made = Callers(server, 2 * STREAMS)
    yield made
    made.close()


def probe(server, path):
    """Status of a probe, None once nobody listens."""
    try:
        return httpx.get(f"{server.url}{path}", timeout=5).status_code
    except httpx.TransportError:
        return None


def ended(server):
    """Status and time of the end; processes that are left."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    started = time.monotonic()
    status = server.process.wait(CUT_SECONDS + SECONDS)
    seconds = time.monotonic() - started
    _, left = psutil.wait_procs(children, SECONDS)
    return status, seconds, left


def test_a_dead_engine_is_an_error_for_all_at_once_and_the_end(server, callers):
    held = [
        callers.ask(seed=HELD, stream=stream, calibration=calibration)
        for stream in (False, True)
        for calibration in (None, CALIBRATION)
        for _ in range(STREAMS // 4)
    ]
    time.sleep(1)
    assert not any(answer.done() for answer in held)
    died = time.monotonic()
    server.process.send_signal(signal.SIGUSR1)
    answers = [answer.result() for answer in held]
    status, seconds, left = ended(server)
    logger.info("last answer after %.2f s", max(a.at for a in answers) - died)
    logger.info("status %d after %.2f s", status, seconds)
    for answer in answers:
        assert answer.error["message"] == "the engine has died"
        assert answer.error["type"] == "server_error"
        assert answer.status == 500 or answer.done
    assert max(answer.at for answer in answers) - died < 1
    assert (status, left) == (1, [])


@pytest.mark.long
def test_a_dead_engine_shows_and_ends_an_idle_server(server):
    assert probe(server, "/health") == 200
    server.process.send_signal(signal.SIGUSR1)
    time.sleep(0.2)
    assert probe(server, "/health") in (503, None)
    assert probe(server, "/ready") in (503, None)
    status, seconds, left = ended(server)
    logger.info("idle: status %d after %.2f s", status, seconds)
    assert (status, left) == (1, [])
    assert seconds < SECONDS


def test_a_drain_finishes_what_it_can_and_ends_the_rest(server, callers):
    paced = [
        callers.ask(
            seed=PACED, stream=True, max_tokens=50, calibration=CALIBRATION if index % 2 else None
        )
        for index in range(STREAMS)
    ]
    held = [callers.ask(seed=HELD, stream=index % 2 == 0) for index in range(4)]
    time.sleep(1)
    deaf = unread(server)
    told = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert (probe(server, "/ready"), probe(server, "/health")) == (503, 200)
    refused = callers.ask().result()
    assert (refused.status, refused.error["code"]) == (503, "draining")
    status, _, left = ended(server)
    logger.info("drain of %d s ended after %.2f s", CUT_SECONDS, time.monotonic() - told)
    assert (status, left) == (0, [])
    assert time.monotonic() - told < CUT_SECONDS + SECONDS
    for index, answer in enumerate(stream.result() for stream in paced):
        assert answer.done
        assert answer.error is None
        assert ('"calibration":' in answer.text) == (index % 2 == 1)
    for answer in (each.result() for each in held):
        assert answer.status == 503 or answer.done
        assert "shut down before" in answer.error["message"]
    deaf.close()


def unread(server):
    """A connection with much to read that nobody reads."""
    parts = urlsplit(server.url)
    connection = socket.create_connection((parts.hostname, parts.port))
    connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
    return connection
