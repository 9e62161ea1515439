"""Bytes of all kinds at the port: the server answers or hangs up, and neither falls nor grows."""

from __future__ import annotations

import logging
import os
import random
import re
import socket
import time
from itertools import islice
from urllib.parse import urlsplit

import pytest

from tests.reliability import sockets

PER_EXAMPLE = 50
WARM_UP = 400
GROWTH = 20 << 20
STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
# Longer than any deadline of this server.
SECONDS = 15
logger = logging.getLogger(__name__)
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("engine")]


@pytest.fixture
def address(server):
    parts = urlsplit(server.url)
    return parts.hostname, parts.port


def resident(server):
    """Bytes of memory the server's process holds."""
    with open(f"/proc/{server.process.pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def still_there(server):
    with server.client() as client:
        assert client.get("/ready").status_code == 200
        body = {"prompt": "hello", "max_tokens": 2}
        assert client.post("/v1/completions", json=body).status_code == 200
    return server.process.poll() is None


def test_odd_bytes_neither_break_the_server_nor_make_it_grow(server, address, examples):
    seed = 1 if "CI" in os.environ else random.randrange(2**32)
    made = sockets.messages(random.Random(seed))
    for sent in islice(made, WARM_UP):
        sockets.exchange(address, sent, SECONDS)
    before, lines = resident(server), len(server.log.read_text(errors="replace"))
    count, statuses = examples * PER_EXAMPLE, {}
    for sent in islice(made, count):
        for status in STATUS.findall(sockets.exchange(address, sent, SECONDS)):
            statuses[status] = statuses.get(status, 0) + 1
    growth = resident(server) - before
    logger.info("%d messages, seed %d: %s; grown %d KiB", count, seed, statuses, growth >> 10)
    assert still_there(server)
    assert not [status for status in statuses if status >= b"500"], f"seed {seed}"
    assert "Traceback" not in server.log.read_text(errors="replace")[lines:], f"seed {seed}"
    assert growth < GROWTH, f"seed {seed}"


def test_slow_headers_of_many_are_cut_off_in_time(server, address, examples):
    count = min(25 * examples, 500)
    before, held = resident(server), []
    started = time.monotonic()
    for _ in range(count):
        connection = socket.create_connection(address, timeout=SECONDS)
        connection.sendall(b"GET /version HTTP/1.1\r\nX: ")
        held.append(connection)
    assert still_there(server)
    for connection in held:
        assert b" 408 " in connection.recv(4096)
        connection.close()
    seconds = time.monotonic() - started
    logger.info("%d slow connections, all cut off after %.1f s", count, seconds)
    assert seconds < SECONDS
    assert resident(server) - before < GROWTH
    assert still_there(server)


def test_a_flood_of_headers_is_cut_off_early(server, address):
    before = resident(server)
    with socket.create_connection(address, timeout=SECONDS) as connection:
        sent, found = connection.send(b"GET /version HTTP/1.1\r\n"), b""
        try:
            for index in range(1_000_000):
                sent += connection.send(b"X-%d: " % index + b"y" * 1000 + b"\r\n")
        except (ConnectionResetError, BrokenPipeError):
            pass
        try:
            found = connection.recv(4096)
        except ConnectionResetError:
            pass
    assert found == b"" or b" 431 " in found
    # What the two machines' buffers take comes on top of the limit.
    assert sent < 16 << 20
    assert resident(server) - before < GROWTH
    assert still_there(server)
