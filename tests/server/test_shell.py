"""vLLM's own application, with all its routes, behind all of our middleware; no engine."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import sys
from functools import cache
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry
from starlette.routing import Mount
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect
from uvicorn.config import HTTP_PROTOCOLS
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.launcher import serve_http
from vllm.entrypoints.serve.instrumentator import metrics

from server import protocol, serve
from server.app import handle_errors
from server.limits import Limits
from server.middleware.drain import Gate
from server.middleware.paths import OPEN_PATHS, PROBES
from server.protocol import select
from server.settings import Settings
from server.shell import enclose

KEY, OTHER = "sesame-" + "1" * 20, "sesame-" + "2" * 20
PARAMETER = re.compile(r"{[^}]*}")
HOSTS = [
    "testserver",
    "x/health",
    "a:b:c",
    "testserver/health?",
    "[::1",
    "",
    "x\\health",
    "@/health",
]


def build(*flags):
    """vLLM's application as a server of ours has it, with these flags."""
    args = serve.parse(["model", *flags])
    os.environ["VLLM_PLUGINS"] = "trimtab"
    app = build_app(args, ("generate",))
    app.state.trimtab = SimpleNamespace(
        gate=Gate(), capacity=sys.maxsize, metrics=SimpleNamespace(overloaded=lambda: None)
    )
    app.state.engine_client = SimpleNamespace(errored=False)
    handle_errors(app)
    enclose(app, args, Settings.from_args(args))
    return app


@pytest.fixture(scope="module")
def make_app():
    """Build applications, each once: it takes a third of a second."""
    with pytest.MonkeyPatch.context() as patch:
        # Nothing of these tests is left for others.
        patch.setattr(os, "environ", os.environ.copy())
        patch.setattr(protocol, "select", lambda limits: None)
        yield cache(build)


@pytest.fixture(scope="module")
def make_client(make_app):
    def make(*flags):
        return TestClient(make_app(*flags), raise_server_exceptions=False, follow_redirects=False)

    return make


@pytest.fixture(scope="module")
def guarded(make_client):
    return make_client("--api-key", KEY)


def discovered(app):
    """(method, path) of all routes, those of mounted applications too."""
    for route in app.routes:
        path = PARAMETER.sub("x", route.path)
        if isinstance(route, Mount):
            yield "GET", path + "/"
        for method in sorted(getattr(route, "methods", None) or {"GET"}):
            yield method, path


def is_enveloped(response):
    content = response.json()
    assert set(content) == {"error"}
    assert set(content["error"]) == {"message", "type", "param", "code"}
    assert len(response.content) <= 4096
    return content["error"]


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def test_every_route_but_the_probes_needs_a_key(guarded):
    routes = list(discovered(guarded.app))
    assert len(routes) > 20
    for method, path in routes:
        answers = [
            guarded.request(method, path),
            guarded.request(method, path, headers=bearer("x")),
        ]
        wanted = 401 if path not in PROBES else None
        assert all((a.status_code == 401) == (wanted == 401) for a in answers), (method, path)


def test_every_route_in_every_spelling_needs_a_key(guarded):
    for method, path in discovered(guarded.app):
        for spelled in (f"/{path}", f"{path}/", path.replace("/", "//"), path.upper()):
            if spelled in PROBES:
                continue
            for sent in (method, "OPTIONS"):
                for host in ("testserver", "x/health"):
                    response = guarded.request(sent, spelled, headers={"Host": host})
                    assert response.status_code == 401, (sent, spelled, host)


def test_with_the_key_every_route_is_reached(guarded):
    for method, path in discovered(guarded.app):
        if path.startswith("/v1/models") or path in ("/docs", "/metrics"):
            response = guarded.request(method, path, headers=bearer(KEY))
            assert response.status_code != 401, (method, path)


SPELLINGS = (
    "/v1/models",
    "//v1/models",
    "/v1//models",
    "/v1/models/",
    "/health/",
    "//health",
    "/health/../v1/models",
    "/health%2f..%2fv1%2fmodels",
    "/v1/models?x=/health",
    "/health;/v1/models",
    "/HEALTH",
    "/nowhere",
    "/",
    "/metrics",
    "/metrics/x",
)


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "HEAD", "PUT", "TRACE", "X"])
def test_no_spelling_of_a_path_and_no_method_gets_past(guarded, method):
    for path in SPELLINGS:
        response = guarded.request(method, path)
        assert response.status_code == 401, path
        assert response.headers["WWW-Authenticate"] == "Bearer"
        if method != "HEAD":
            error = is_enveloped(response)
            assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")


@pytest.mark.parametrize("host", HOSTS)
def test_the_host_says_nothing_about_the_path(guarded, host):
    assert guarded.get("/v1/models", headers={"Host": host}).status_code == 401
    assert guarded.post("/invocations", headers={"Host": host}, json={}).status_code == 401
    assert guarded.get("/version", headers={"Host": host}).status_code == 200


def test_a_root_path_moves_the_door_not_the_lock(make_client):
    client = make_client("--api-key", KEY, "--root-path", "/api")
    for path in ("/api/v1/models", "/v1/models", "/api/api/version", "/apiversion"):
        assert client.get(path).status_code == 401, path
    for path in ("/api/version", "/version"):
        assert client.get(path).status_code == 200, path


def test_metrics_are_open_where_that_is_said(make_client):
    client = make_client("--api-key", KEY, "--metrics-without-key", "true")
    assert client.get("/metrics").status_code == 200
    assert client.get("/v1/models").status_code == 401
    assert KEY not in client.get("/metrics").text


def test_keys_come_from_flags_and_from_a_file(make_client, tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# of the team\n\n{OTHER}\n")
    client = make_client("--api-key", KEY, "--api-key-file", str(file))
    for key in (KEY, OTHER):
        assert client.get("/docs", headers=bearer(key)).status_code == 200
    assert client.get("/docs", headers=bearer("# of the team")).status_code == 401


def test_keys_come_from_the_environment_as_vllm_has_it(make_client, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", OTHER)
    client = make_client("--port", "8001")
    assert client.get("/docs").status_code == 401
    assert client.get("/docs", headers=bearer(OTHER)).status_code == 200


def test_a_key_on_the_command_line_goes_before_that_of_the_environment(make_client, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", OTHER)
    client = make_client("--port", "8002", "--api-key", KEY)
    assert client.get("/docs", headers=bearer(KEY)).status_code == 200
    assert client.get("/docs", headers=bearer(OTHER)).status_code == 401


def test_without_keys_nothing_is_locked(make_client):
    assert make_client().get("/docs").status_code == 200


def test_a_browser_may_ask_before_it_asks(make_client):
    client = make_client("--api-key", KEY, "--allowed-origins", '["https://a.example"]')
    headers = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    assert client.options("/v1/completions", headers=headers).status_code == 200
    assert (
        client.post("/v1/completions", headers={"Origin": "https://a.example"}).status_code == 401
    )


@pytest.mark.parametrize("path", ["/v1/realtime", "/nowhere", "/health"])
def test_a_websocket_needs_a_key_wherever_it_goes(guarded, path):
    with pytest.raises(WebSocketDisconnect) as caught, guarded.websocket_connect(path):
        pass
    assert caught.value.code == 1008


@pytest.mark.parametrize(
    ("method", "path", "options", "status"),
    [
        ("POST", "/v1/completions", {"content": b"{"}, 400),
        ("POST", "/v1/completions", {"json": {"prompt": 5}}, 400),
        ("POST", "/v1/completions", {"content": b'{"n": NaN}'}, 400),
        ("POST", "/v1/completions", {"json": {"n": 1000}}, 400),
        ("POST", "/v1/responses", {"json": {"top_logprobs": 1000}}, 400),
        ("GET", "/nowhere", {}, 404),
        ("GET", "/v1/completions", {}, 405),
        ("POST", "/v1/completions", {"content": b"a" * 20_000_001}, 413),
        ("GET", "/v1/models", {"headers": {"X": "a" * 40_000}}, 431),
        ("GET", "/v1/models", {}, 500),
    ],
)
def test_every_error_has_the_one_form(make_client, method, path, options, status):
    response = make_client().request(method, path, **options)
    assert response.status_code == status
    is_enveloped(response)
    assert response.headers["X-Request-Id"]
    assert not re.search(r"Traceback|File \"|0x[0-9a-f]{6}|/site-packages/", response.text)


def test_ids_are_echoed_once_whatever_vllm_does(make_client):
    client = make_client("--enable-request-id-headers")
    for path in ("/version", "/nowhere"):
        response = client.get(path, headers={"X-Request-Id": "mine"})
        assert response.headers.get_list("X-Request-Id") == ["mine"]


def test_an_overloaded_server_answers_probes(make_app):
    app = make_app("--port", "8003")
    app.state.trimtab.capacity = 0
    client = TestClient(app)
    response = client.post("/v1/completions", json={"prompt": "x"})
    assert (response.status_code, is_enveloped(response)["code"]) == (503, "overloaded")
    assert int(response.headers["Retry-After"]) > 0
    assert all(client.get(path).status_code == 200 for path in OPEN_PATHS - {"/health"})


async def spoken(app, sent):
    """What vLLM's own launcher, serving `app`, answers to some bytes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        host, port = listener.getsockname()
        # As vLLM calls it: the protocol is not named.
        flags = {"h11_max_incomplete_event_size": serve.HEADER_BYTES, "log_level": "critical"}
        job = asyncio.create_task(serve_http(app, listener, host=host, port=port, **flags))
        while not getattr(getattr(app.state, "server", None), "started", False):
            await asyncio.sleep(0.01)
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(sent)
        found = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        app.state.server.should_exit = True
        await (await job)
    return found


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"\0\r\n\r\n", b"invalid_http"),
        (b"GET / HTTP/1.1\r\nHost: " + b"a" * 100_000, b"headers_too_large"),
        (b"GET / HT", b"request_timeout"),
        (b"GET /version HTTP/1.0\r\n\r\n", b"vllm_version"),
    ],
    ids=["no HTTP", "long headers", "slow headers", "a request"],
)
@pytest.mark.usefixtures("make_app")
def test_the_launcher_of_vllm_speaks_our_protocol(monkeypatch, sent, said):
    monkeypatch.setitem(HTTP_PROTOCOLS, "auto", HTTP_PROTOCOLS["auto"])
    select(Limits(header_timeout=0.3))
    # The launcher leaves nothing of an application's state.
    app = build()
    app.state.server, app.state.engine_client, app.state.log_stats = None, None, False
    assert said in asyncio.run(spoken(app, sent))


def crafted():
    """Small bodies that make validators write much."""
    many = [{"role": 5}] * 500
    yield {"messages": many, "model": "m"}
    yield {"messages": [{"role": "user", "content": [{"type": i} for i in range(400)]}]}
    yield {"messages": [{"role": "user", "content": "x"}], "tools": [{"type": 1}] * 120}
    yield {"a" * 5000: 1, "messages": "x"}
    yield {"messages": [{"role": "\u0000" * 4000, "content": "\ud800"}], "model": "\ud800" * 500}
    yield {"prompt": [["\\" * 1000]] * 4, "n": '"' * 900}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
@pytest.mark.parametrize("body", list(crafted()), ids=range(6))
def test_a_small_body_makes_no_long_answer(make_client, path, body):
    response = make_client().post(path, content=json.dumps(body), headers=JSON)
    assert 400 <= response.status_code < 600
    is_enveloped(response)


JSON = {"Content-Type": "application/json"}


def test_refusals_are_counted(monkeypatch, make_app):
    # vLLM may have built the stack once already, and counters are registered once only.
    registry = CollectorRegistry()
    monkeypatch.setattr(metrics, "get_prometheus_registry", lambda: registry)
    client = TestClient(make_app("--max-n", "3"), raise_server_exceptions=False)
    for n in (4, 5):
        assert client.post("/v1/completions", json={"prompt": "hi", "n": n}).status_code == 400
    labels = {"method": "POST", "status": "4xx", "handler": "/v1/completions"}
    assert registry.get_sample_value("http_requests_total", labels) == 2
