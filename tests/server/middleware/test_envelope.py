"""Errors of anybody, in one form."""

from __future__ import annotations

import json

import pytest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from server.errors import envelope
from server.middleware.envelope import EnvelopeMiddleware


@pytest.fixture
def ask(make_client):
    """The answer to what a route answers."""

    def run(response, path="/given", **options):
        async def give(request):
            return response

        client = make_client(EnvelopeMiddleware, more=[Route(path, give)], **options)
        return client.get(path, follow_redirects=False)

    return run


OURS = envelope(400, "said so", "field", "the_code")


@pytest.mark.parametrize(
    ("given", "message", "code"),
    [
        (JSONResponse(OURS, 400), "said so", "the_code"),
        (JSONResponse({"error": {"message": "m", "code": 400}}, 400), "m", "bad_request"),
        (JSONResponse({"error": "Unauthorized"}, 401), "Unauthorized", "unauthorized"),
        (JSONResponse({"detail": "Not Found"}, 404), "Not Found", "not_found"),
        (JSONResponse({"detail": [{"msg": "x"}]}, 422), None, "unprocessable_entity"),
        (JSONResponse({"status": "no"}, 503), None, "service_unavailable"),
        (JSONResponse([1, 2], 400), None, "bad_request"),
        (PlainTextResponse("text", 500), None, "internal_server_error"),
        (Response(b"\xff\x00", 500), None, "internal_server_error"),
        (Response(b"[" * 60_000, 400), None, "bad_request"),
        (Response(status_code=503), None, "service_unavailable"),
        (Response(status_code=599), None, "internal_server_error"),
        (PlainTextResponse("a" * 1_000_000, 500), None, "internal_server_error"),
    ],
)
def test_every_form_becomes_ours(ask, given, message, code):
    response = ask(given)
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert error["message"] == message if message else error["message"].endswith(".")
    assert response.headers["content-type"] == "application/json"
    assert int(response.headers["content-length"]) == len(response.content) <= 4096


def test_param_and_status_stay(ask):
    response = ask(JSONResponse(OURS, 400))
    assert (response.status_code, response.json()) == (400, OURS)


def test_headers_stay(ask):
    response = ask(PlainTextResponse("x", 503, headers={"Retry-After": "7", "X-Load": "3"}))
    assert (response.headers["Retry-After"], response.headers["X-Load"]) == ("7", "3")


@pytest.mark.parametrize(("status", "said"), [(503, "1"), (429, "1"), (500, None)])
def test_where_trying_again_may_help_an_answer_says_when(ask, status, said):
    assert ask(PlainTextResponse("x", status)).headers.get("Retry-After") == said


def test_an_error_in_pieces_is_put_together(ask):
    async def pieces():
        for byte in json.dumps(OURS):
            yield byte

    assert ask(StreamingResponse(pieces(), 400)).json() == OURS


@pytest.mark.parametrize("status", [200, 204, 307])
def test_what_is_no_error_is_left_alone(ask, status):
    body = b"" if status == 204 else b"anything"
    response = ask(Response(body, status, headers={"Location": "/other"}))
    assert (response.status_code, response.content) == (status, body)


def test_some_paths_have_a_form_of_their_own(ask):
    response = ask(
        JSONResponse({"status": "draining"}, 503), "/ready", exempt=frozenset({"/ready"})
    )
    assert response.json() == {"status": "draining"}


def events(*bodies):
    """A stream of an answer and these errors, each written as vLLM writes it."""

    async def pieces():
        yield 'data: {"choices":[{"text":"data: {\\"error\\": 1}"}]}\n\n'
        for body in bodies:
            yield f"data: {json.dumps(body)}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(pieces(), media_type="text/event-stream")


DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."


@pytest.mark.parametrize(
    ("given", "message", "kind", "code"),
    [
        ({"message": "gone", "type": "X", "code": 503}, "gone", "server_error", None),
        ({"message": DEAD, "code": 500}, "the engine has died", "server_error", None),
        ({"message": "m", "code": 400}, "m", "invalid_request_error", "bad_request"),
        ({"message": "m", "code": "ours", "param": "p"}, "m", "server_error", "ours"),
        ("text", "text", "server_error", None),
        ({"message": "a" * 9000, "code": 500}, "a" * 1000 + "...", "server_error", None),
    ],
)
def test_an_error_in_a_stream_has_the_form_of_all_errors(ask, given, message, kind, code):
    first, error, last, end = ask(events({"error": given})).text.split("\n\n")
    assert (first, last, end) == (
        'data: {"choices":[{"text":"data: {\\"error\\": 1}"}]}',
        "data: [DONE]",
        "",
    )
    found = json.loads(error.removeprefix("data: "))["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert (found["message"], found["type"]) == (message, kind)
    assert code is None or found["code"] == code


def test_a_stream_without_errors_keeps_every_byte(ask):
    assert ask(events()).text == (
        'data: {"choices":[{"text":"data: {\\"error\\": 1}"}]}\n\ndata: [DONE]\n\n'
    )


def test_what_is_no_stream_of_events_is_not_read(ask):
    body = b'data: {"error": 1}\n\n'
    assert ask(Response(body)).content == body
