"""Answers that take too long."""

from __future__ import annotations

import asyncio
import json

import pytest
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute

from server.middleware.time_limit import TimeLimitMiddleware

SECONDS = 0.1


@pytest.fixture
def ended():
    """Why what worked on a request ended."""
    return []


@pytest.fixture
def client(make_client, ended):
    async def work():
        try:
            await asyncio.sleep(5)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async def plain(request):
        await work()

    async def broken(request):
        raise TimeoutError("its own")

    async def stream(request):
        async def pieces():
            yield "data: {}\n\n"
            await work()

        return StreamingResponse(pieces(), media_type="text/event-stream")

    async def quick(request):
        return JSONResponse({})

    async def socket(websocket):
        await websocket.accept()
        await asyncio.sleep(2 * SECONDS)
        await websocket.send_text("still here")
        await websocket.close()

    routes = [
        Route("/plain", plain),
        Route("/broken", broken),
        Route("/events", stream),
        Route("/quick", quick),
        WebSocketRoute("/socket", socket),
    ]
    return make_client(TimeLimitMiddleware, SECONDS, more=routes)


def is_timeout(error):
    assert (error["type"], error["code"], error["param"]) == ("server_error", "timeout", None)
    assert "0.1 seconds" in error["message"]


def test_a_quick_answer_is_not_touched(client):
    assert client.get("/quick").json() == {}


def test_a_slow_answer_is_an_error_and_the_work_on_it_is_cancelled(client, ended):
    response = client.get("/plain")
    assert response.status_code == 504
    assert response.headers["X-Should-Retry"] == "false"
    is_timeout(response.json()["error"])
    assert ended == ["cancelled"]


def test_a_stream_ends_with_an_error_event(client, ended):
    first, error, last, end = client.get("/events").text.split("\n\n")
    assert (first, last, end) == ("data: {}", "data: [DONE]", "")
    is_timeout(json.loads(error.removeprefix("data: "))["error"])
    assert ended == ["cancelled"]


def test_anything_else_is_broken_off():
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(5)

    async def send(message):
        sent.append(message["type"])

    with pytest.raises(TimeoutError):
        asyncio.run(TimeLimitMiddleware(app, SECONDS)({"type": "http"}, None, send))
    assert sent == ["http.response.start"]


def test_a_timeout_of_the_application_is_its_own(client):
    assert client.get("/broken").status_code == 500


def test_other_protocols_pass(client):
    with client.websocket_connect("/socket") as websocket:
        assert websocket.receive_text() == "still here"


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_a_limit_has_to_let_something_be_done(seconds):
    with pytest.raises(ValueError, match="nothing is done"):
        TimeLimitMiddleware(lambda: None, seconds)
