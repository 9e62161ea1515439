"""What a request leaves in the log, and what it does not."""

from __future__ import annotations

import asyncio
import logging

import pytest
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from server.middleware.envelope import EnvelopeMiddleware
from server.middleware.request_id import RequestIdMiddleware
from server.middleware.request_log import RequestLogMiddleware, logger, record_of


@pytest.fixture
def lines():
    """Records of the log."""
    found = []
    handler = logging.Handler()
    handler.emit = found.append
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(level)


def stack(app):
    return RequestIdMiddleware(RequestLogMiddleware(EnvelopeMiddleware(app)))


@pytest.fixture
def client(make_client):
    async def status(request):
        return PlainTextResponse("secret answer", request.path_params["status"])

    async def broken(request):
        raise RuntimeError("secret error")

    async def stream(request):
        async def pieces():
            yield "data: {}\n\n"
            if request.query_params.get("fail"):
                yield 'data: {"error": {"message": "m", "code": 500}}\n\n'

        return StreamingResponse(pieces(), media_type="text/event-stream")

    async def calibrated(request):
        record = record_of(request.scope)
        record.methods, record.digest, record.outcome = "zerotuning", "4be1c0a9d2f7", "skipped"
        return PlainTextResponse("ok")

    routes = [
        Route("/status/{status:int}", status, methods=["GET", "POST"]),
        Route("/broken", broken),
        Route("/stream", stream),
        Route("/calibrated", calibrated),
    ]
    return make_client(stack, more=routes)


@pytest.mark.parametrize(
    ("path", "status", "outcome"),
    [
        ("/status/200", 200, "answered"),
        ("/status/404", 404, "rejected"),
        ("/status/503", 503, "failed"),
        ("/broken", 500, "failed"),
        ("/stream", 200, "answered"),
        ("/stream?fail=1", 200, "failed"),
        ("/calibrated", 200, "skipped"),
    ],
)
def test_every_request_is_a_line(client, lines, path, status, outcome):
    client.get(path, headers={"X-Request-Id": "mine"})
    (line,) = lines
    assert (line.request_id, line.status, line.outcome) == ("mine", status, outcome)
    assert (line.http_method, line.path) == ("GET", path.partition("?")[0])
    assert 0 <= line.seconds < 5
    assert f"request_id=mine http_method=GET path={line.path} status={status}" in line.getMessage()


def test_a_calibration_is_told_by_methods_and_digest(client, lines):
    client.get("/calibrated")
    assert (lines[0].calibration, lines[0].digest) == ("zerotuning", "4be1c0a9d2f7")
    assert "calibration=zerotuning digest=4be1c0a9d2f7 outcome=skipped" in lines[0].getMessage()
    client.get("/status/200")
    assert not hasattr(lines[1], "digest")


def test_probes_and_metrics_are_no_lines(client, lines):
    for path in ("/health", "/ready", "/version", "/metrics"):
        client.get(path)
    assert lines == []


def test_nothing_of_what_was_sent_is_in_a_line(client, lines):
    headers = {"Authorization": "Bearer secret-key", "X-Other": "secret-header"}
    client.post("/status/200?q=secret-query", content="secret prompt", headers=headers)
    assert "secret" not in str(vars(lines[0]))


def test_no_path_makes_a_second_line(client, lines):
    client.get("/a%0Arequest%20request_id=forged" + "x" * 1000)
    assert "\n" not in lines[0].getMessage()
    assert " request_id=forged" not in lines[0].getMessage()
    assert len(lines[0].path) == 200


def test_a_client_that_leaves_is_told_from_a_failure(lines):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await receive()
        record_of(scope).outcome = "failed"

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        pass

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    asyncio.run(RequestLogMiddleware(app)(scope, receive, send))
    assert lines[0].outcome == "left"


def test_without_a_log_a_record_is_nobodys():
    record_of({}).outcome = "failed"
    assert record_of({}).outcome is None
