import asyncio

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient

from server.middleware.drain import POLL_SECONDS, DrainMiddleware, Gate
from server.middleware.paths import OPEN_PATHS


@pytest.fixture
def drained():
    """A client and the gate of its server."""
    gate = Gate()

    async def answer(request):
        return PlainTextResponse(f"answered with {gate.inside} inside")

    async def fail(request):
        raise RuntimeError("failed")

    async def socket(websocket):
        await websocket.accept()
        await websocket.send_text("connected")
        await websocket.close()

    routes = [Route(path, answer, methods=["GET", "POST"]) for path in ("/v1/x", *OPEN_PATHS)]
    routes.append(Route("/v1/fail", fail))
    app = Starlette(routes=[*routes, WebSocketRoute("/socket", socket)])
    app.add_middleware(DrainMiddleware, gate=lambda: gate)
    return TestClient(app, raise_server_exceptions=False), gate


def test_nothing_is_refused_before(drained):
    client, _ = drained
    assert client.post("/v1/x").text == "answered with 1 inside"


def test_new_work_is_refused(drained):
    client, gate = drained
    gate.close(0)
    response = client.post("/v1/x")
    assert response.status_code == 503
    assert int(response.headers["Retry-After"]) > 0
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "draining")
    assert gate.inside == 0


@pytest.mark.parametrize("path", sorted(OPEN_PATHS))
def test_probes_and_metrics_stay_open(drained, path):
    client, gate = drained
    gate.close(0)
    assert client.get(path).text == "answered with 0 inside"


@pytest.mark.parametrize("path", ["/metrics/x", "/healthy", "/v1/health", "/Health"])
def test_only_the_paths_themselves_are_open(drained, path):
    client, gate = drained
    gate.close(0)
    assert client.get(path).status_code == 503


def test_other_protocols_pass(drained):
    client, gate = drained
    gate.close(0)
    with client.websocket_connect("/socket") as websocket:
        assert websocket.receive_text() == "connected"


@pytest.mark.parametrize("path", ["/v1/x", "/v1/fail", "/v1/none"])
def test_whoever_is_answered_is_inside_no_more(drained, path):
    client, gate = drained
    client.get(path)
    assert gate.inside == 0


def test_whoever_is_inside_is_waited_for_and_nobody_else_let_in():
    """Closed by another thread, as the launcher does, while a request is on its way."""

    async def close_around():
        gate, arrived, go_on = Gate(), asyncio.Event(), asyncio.Event()

        async def app(scope, receive, send):
            arrived.set()
            await go_on.wait()

        middleware = DrainMiddleware(app, lambda: gate)
        scope = {"type": "http", "path": "/v1/x", "method": "POST"}
        request = asyncio.create_task(middleware(scope, None, None))
        await arrived.wait()
        closing = asyncio.create_task(asyncio.to_thread(gate.close, 60))
        while not gate.closed:
            await asyncio.sleep(0)
        sent = []

        async def send(message):
            sent.append(message)

        await middleware(scope, None, send)
        assert sent[0]["status"] == 503
        await asyncio.sleep(3 * POLL_SECONDS)
        assert not closing.done()
        go_on.set()
        await request
        await closing

    asyncio.run(asyncio.wait_for(close_around(), 30))


def test_whoever_takes_too_long_is_not_waited_for():
    gate = Gate()
    gate.inside = 1
    gate.close(0.01)
    assert (gate.closed, gate.inside) == (True, 1)
