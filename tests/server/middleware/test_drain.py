import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient

from server.middleware.drain import DrainMiddleware
from server.middleware.paths import OPEN_PATHS


@pytest.fixture
def drained():
    """A client and the switch of its server."""
    state = {"draining": False}

    async def answer(request):
        return PlainTextResponse("answered")

    async def socket(websocket):
        await websocket.accept()
        await websocket.send_text("connected")
        await websocket.close()

    routes = [Route(path, answer, methods=["GET", "POST"]) for path in ("/v1/x", *OPEN_PATHS)]
    app = Starlette(routes=[*routes, WebSocketRoute("/socket", socket)])
    app.add_middleware(DrainMiddleware, draining=lambda: state["draining"])
    return TestClient(app), state


def test_nothing_is_refused_before(drained):
    client, _ = drained
    assert client.post("/v1/x").text == "answered"


def test_new_work_is_refused(drained):
    client, state = drained
    state["draining"] = True
    response = client.post("/v1/x")
    assert response.status_code == 503
    assert int(response.headers["Retry-After"]) > 0
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "draining")
    state["draining"] = False
    assert client.post("/v1/x").status_code == 200


@pytest.mark.parametrize("path", sorted(OPEN_PATHS))
def test_probes_and_metrics_stay_open(drained, path):
    client, state = drained
    state["draining"] = True
    assert client.get(path).text == "answered"


@pytest.mark.parametrize("path", ["/metrics/x", "/healthy", "/v1/health", "/Health"])
def test_only_the_paths_themselves_are_open(drained, path):
    client, state = drained
    state["draining"] = True
    assert client.get(path).status_code == 503


def test_other_protocols_pass(drained):
    client, state = drained
    state["draining"] = True
    with client.websocket_connect("/socket") as websocket:
        assert websocket.receive_text() == "connected"
