"""Raw sockets against uvicorn with our protocol, chosen as vLLM lets it be chosen."""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import contextmanager

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route
from uvicorn import config as uvicorn_config

from server import protocol
from server.limits import Limits
from server.middleware.body_limit import BodyLimitMiddleware
from server.middleware.header_limit import HeaderLimitMiddleware

HEADER_BYTES = 32 * 1024
BODY_BYTES = 200_000
SECONDS = 0.4
POST = b"POST /echo HTTP/1.1\r\nHost: x\r\n"


class Server:
    """Where it listens, and what its routes have seen."""

    def __init__(self):
        self.port = 0
        self.received = 0

    def app(self):
        async def echo(request):
            async for piece in request.stream():
                self.received += len(piece)
            return PlainTextResponse("answered")

        async def early(request):
            return PlainTextResponse("early")

        async def stream(request):
            async def pieces():
                yield b"one"
                yield b"two"

            return StreamingResponse(pieces())

        routes = [
            Route("/echo", echo, methods=["GET", "POST"]),
            Route("/early", early, methods=["POST"]),
            Route("/stream", stream, methods=["GET"]),
        ]
        app = BodyLimitMiddleware(Starlette(routes=routes), BODY_BYTES)
        return HeaderLimitMiddleware(app, HEADER_BYTES, 100)


@contextmanager
def listening(server):
    config = uvicorn.Config(server.app(), port=0, lifespan="off", log_level="critical")
    config.h11_max_incomplete_event_size = HEADER_BYTES
    config.load()
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run)
    thread.start()
    deadline = time.monotonic() + 10
    while not running.started and time.monotonic() < deadline:
        time.sleep(0.005)
    server.port = running.servers[0].sockets[0].getsockname()[1]
    yield running
    running.should_exit = True
    running.force_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def server():
    before = uvicorn_config.HTTP_PROTOCOLS["auto"]
    protocol.select(Limits(header_timeout=SECONDS, body_timeout=SECONDS))
    made = Server()
    with listening(made):
        yield made
    uvicorn_config.HTTP_PROTOCOLS["auto"] = before


@pytest.fixture
def connect(server):
    """Open connections, all closed at the end."""
    opened = []

    def make():
        opened.append(socket.create_connection(("127.0.0.1", server.port), timeout=5))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def everything(connection):
    """All that comes until the other side closes."""
    found = b""
    try:
        while piece := connection.recv(65536):
            found += piece
    except ConnectionResetError:
        pass
    return found


def answer(connection):
    """Status and error object of the one answer before the end."""
    head, _, body = everything(connection).partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


def push(connection, piece, most):
    """Send until the other side has had enough; how much it took."""
    sent = 0
    try:
        while sent < most:
            sent += connection.send(piece)
    except OSError:
        pass
    return sent


def test_an_ordinary_exchange(connect):
    connection = connect()
    connection.sendall(POST + b"Content-Length: 3\r\n\r\nabc")
    assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    connection.sendall(b"GET /stream HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert b"two" in everything(connection)


def test_pipelined_requests_are_all_answered(connect):
    connection = connect()
    connection.sendall((POST + b"Content-Length: 3\r\n\r\nabc") * 3)
    connection.sendall(POST + b"Content-Length: 0\r\nConnection: close\r\n\r\n")
    assert everything(connection).count(b"answered") == 4


@pytest.mark.parametrize("sent", [b"", b"GET /echo HT", b"GET /echo HTTP/1.1\r\nHost: x\r\n"])
def test_headers_that_do_not_come_close_the_connection(connect, sent):
    connection = connect()
    start = time.monotonic()
    connection.sendall(sent)
    found = everything(connection)
    assert SECONDS - 0.1 < time.monotonic() - start < SECONDS + 1
    assert (b"408" in found) == bool(sent)


def test_a_byte_now_and_then_does_not_move_the_deadline(connect):
    connection = connect()
    start = time.monotonic()
    pieces = iter(b"GET /echo HTTP/1.1\r\nHost: " + b"x" * 1000)
    try:
        while time.monotonic() - start < SECONDS + 2:
            connection.sendall(bytes([next(pieces)]))
            time.sleep(0.05)
    except OSError:
        pass
    assert time.monotonic() - start < SECONDS + 1


@pytest.mark.parametrize(
    "sent",
    [b"Content-Length: 10\r\n\r\nabc", b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"],
    ids=["declared", "chunked"],
)
def test_a_body_that_does_not_come_is_answered_and_closed(connect, sent):
    connection = connect()
    start = time.monotonic()
    connection.sendall(POST + sent)
    status, error = answer(connection)
    assert SECONDS - 0.1 < time.monotonic() - start < SECONDS + 1
    assert (status, error["code"]) == (408, "request_timeout")


def test_a_slow_second_request_is_closed_too(connect):
    connection = connect()
    connection.sendall(POST + b"Content-Length: 0\r\n\r\n")
    assert b"answered" in connection.recv(4096)
    connection.sendall(b"GET /")
    assert answer(connection)[0] == 408


@pytest.mark.parametrize("line", [b"X: " + b"a" * 1000, b"a" * 1003], ids=["values", "names"])
def test_headers_without_end_are_cut(connect, line):
    connection = connect()
    connection.sendall(b"GET /echo HTTP/1.1\r\nHost: x\r\n" + line)
    push(connection, b"a" * 8192, 8 << 20)
    # What the kernels hold on the way is not ours to bound.
    status, error = answer(connection)
    assert (status, error["code"]) == (431, "headers_too_large")


def test_what_the_parser_keeps_of_headers_is_bounded(connect):
    connection = connect()
    connection.sendall(b"GET /echo HTTP/1.1\r\nHost: " + b"a" * (HEADER_BYTES + 1))
    assert answer(connection)[0] == 431


@pytest.mark.parametrize(
    "headers", [b"X: " + b"a" * 60_000 + b"\r\n", b"X: y\r\n" * 120], ids=["long", "many"]
)
def test_whole_headers_in_one_piece_are_bounded_too(connect, headers):
    connection = connect()
    connection.sendall(
        b"GET /echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + headers + b"\r\n"
    )
    status, error = answer(connection)
    assert (status, error["code"]) == (431, "headers_too_large")


@pytest.mark.parametrize(
    "sent", [b"\x00\x01\x02\r\n\r\n", b"GET / HTTP/1.1\r\nbad header\r\n\r\n", b"GET\r\n\r\n"]
)
def test_what_is_not_http_gets_the_envelope(connect, sent):
    connection = connect()
    connection.sendall(sent)
    status, error = answer(connection)
    assert (status, error["code"]) == (400, "invalid_http")


def test_a_bad_chunk_ends_the_request(connect):
    connection = connect()
    connection.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n")
    assert answer(connection)[0] == 400


def test_a_body_declared_too_long_is_refused_unread(connect, server):
    connection, before = connect(), server.received
    connection.sendall(POST + b"Content-Length: 200001\r\n\r\n")
    status, error = answer(connection)
    assert (status, error["code"], server.received) == (413, "body_too_large", before)


def test_a_chunked_body_is_cut_at_the_limit(connect, server):
    connection, before = connect(), server.received
    connection.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n")
    push(connection, b"1000\r\n" + b"a" * 4096 + b"\r\n", 30 << 20)
    assert b"413" in everything(connection)
    assert server.received - before <= BODY_BYTES


def test_what_follows_an_early_answer_is_not_read_for_ever(connect):
    connection = connect()
    connection.sendall(b"POST /early HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    assert b"early" in connection.recv(4096)
    # More is taken by the kernels' buffers, up to some megabytes.
    assert push(connection, b"1000\r\n" + b"a" * 4096 + b"\r\n", 100_000_000) < 30_000_000


def test_a_client_that_finishes_after_an_early_answer_keeps_its_connection(connect):
    connection = connect()
    connection.sendall(b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf ")
    assert b"early" in connection.recv(4096)
    connection.sendall(b"other" + POST + b"Content-Length: 0\r\nConnection: close\r\n\r\n")
    assert b"answered" in everything(connection)


def test_the_server_lives_on(connect):
    connection = connect()
    connection.sendall(POST + b"Content-Length: 0\r\nConnection: close\r\n\r\n")
    assert b"answered" in everything(connection)


@pytest.mark.parametrize(
    ("body", "status"), [(b"zz\r\n", b"400"), (b"5\r\nhel", b"408")], ids=["odd", "slow"]
)
def test_a_refusal_of_head_is_headers_alone(connect, caplog, body, status):
    connection = connect()
    headers = b"HEAD /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    connection.sendall(headers + body)
    found = everything(connection)
    assert found.startswith(b"HTTP/1.1 " + status)
    assert found.endswith(b"\r\n\r\n")
    assert not [record for record in caplog.records if record.name == "asyncio"]


def test_whoever_does_not_read_does_not_hold_up_the_end(server, connect):
    with listening(server) as running:
        assert running.config.timeout_graceful_shutdown is None
        connection = connect()
        connection.sendall(b"GET /stream HTTP/1.0\r\n\r\n")
        assert b"two" in everything(connection)
        assert running.config.timeout_graceful_shutdown == protocol.FAREWELL_SECONDS
