"""Bodies that are too long, by what is declared and by what comes."""

from __future__ import annotations

import asyncio

import pytest
from starlette.requests import ClientDisconnect
from starlette.routing import WebSocketRoute

from server.middleware.body_limit import BodyLimitMiddleware


def pieces(size, count, taken):
    for _ in range(count):
        taken.append(size)
        yield b"a" * size


def refused(response):
    assert response.status_code == 413
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "body_too_large")
    assert "1000 bytes" in error["message"]


@pytest.mark.parametrize("size", [0, 1, 999, 1000])
def test_up_to_the_limit_a_body_arrives_whole(make_client, size):
    client = make_client(BodyLimitMiddleware, 1000)
    assert client.post("/x", content=b"a" * size).json()["length"] == size
    assert client.post("/x", content=pieces(size, 1, [])).json()["length"] == size


def test_one_byte_more_is_refused(make_client):
    client = make_client(BodyLimitMiddleware, 1000)
    refused(client.post("/x", content=b"a" * 1001))
    refused(client.post("/x", content=pieces(1001, 1, [])))
    refused(client.put("/x", content=b"a" * 1001))


def test_many_small_pieces_add_up(make_client):
    client = make_client(BodyLimitMiddleware, 1000)
    assert client.post("/x", content=pieces(10, 100, [])).json()["length"] == 1000
    refused(client.post("/x", content=pieces(10, 101, [])))


def test_what_is_declared_is_refused_whatever_the_route_reads(make_client):
    client = make_client(BodyLimitMiddleware, 1000)
    refused(client.post("/unread", content=b"a" * 1001))


@pytest.mark.parametrize("declared", ["", "-5", "abc", "1e3", "²"])
def test_a_length_that_is_no_number_does_not_lift_the_limit(make_client, declared):
    client = make_client(BodyLimitMiddleware, 1000)
    refused(client.post("/x", content=b"a" * 1001, headers={"Content-Length": declared.encode()}))


def exchange(app):
    """Run an application whose client sends 600 bytes at a time; what was read and sent."""
    sent, read = [], []

    async def receive():
        read.append(600)
        return {"type": "http.request", "body": b"a" * 600, "more_body": True}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    asyncio.run(BodyLimitMiddleware(app, 1000)(scope, receive, send))
    return read, sent


async def drain(receive):
    while (await receive())["type"] != "http.disconnect":
        pass


START = {"type": "http.response.start", "status": 200, "headers": []}


def test_nothing_is_read_past_the_piece_that_is_too_much():
    async def app(scope, receive, send):
        await drain(receive)
        await drain(receive)
        # An answer to what was not read is held back.
        await send(START)
        await send({"type": "http.response.body", "body": b"late"})

    read, sent = exchange(app)
    assert len(read) == 2
    assert [message.get("status") for message in sent] == [413, None]


def test_an_answer_that_has_begun_is_broken_off():
    async def app(scope, receive, send):
        await send(START)
        await drain(receive)
        await send({"type": "http.response.body", "body": b"late"})

    read, sent = exchange(app)
    assert (len(read), sent) == (2, [START])


def test_the_error_of_a_reader_that_was_cut_off_stays_here():
    async def app(scope, receive, send):
        await drain(receive)
        raise ClientDisconnect

    assert [message.get("status") for message in exchange(app)[1]] == [413, None]


def test_other_protocols_pass(make_client):
    async def socket(websocket):
        await websocket.accept()
        await websocket.send_text("connected")
        await websocket.close()

    client = make_client(BodyLimitMiddleware, 1000, more=[WebSocketRoute("/socket", socket)])
    with client.websocket_connect("/socket") as websocket:
        assert websocket.receive_text() == "connected"


def test_a_limit_has_to_let_something_through():
    with pytest.raises(ValueError, match="lets no body through"):
        BodyLimitMiddleware(lambda: None, 0)
