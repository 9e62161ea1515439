import asyncio
import json
from http import HTTPStatus

import pytest
from fastapi import Depends, FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.testclient import TestClient
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException
from vllm.entrypoints.serve.utils.api_utils import validate_json_request

from server import errors
from server.errors import MAX_MESSAGE, ApiError, envelope, in_our_envelope


class Body(BaseModel):
    count: int
    inner: dict[str, int] = {}


@pytest.fixture(scope="module")
def client():
    app = FastAPI()
    app.add_exception_handler(ApiError, errors.handle_api_error)
    app.add_exception_handler(StarletteHTTPException, errors.handle_http_exception)
    app.add_exception_handler(RequestValidationError, errors.handle_validation_error)

    @app.post("/count")
    async def count(body: Body):
        return body

    @app.post("/typed", dependencies=[Depends(validate_json_request)])
    async def typed(body: Body):
        return body

    @app.get("/raise/{status}")
    async def fail(status: int):
        raise HTTPException(status, "said so", headers={"X-Reason": "test"})

    @app.get("/busy")
    async def busy():
        raise ApiError(
            HTTPStatus.SERVICE_UNAVAILABLE,
            "busy",
            param="a.b",
            code="busy",
            headers={"Retry-After": "5"},
        )

    return TestClient(app)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (413, "invalid_request_error"),
        (422, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "server_error"),
        (503, "server_error"),
    ],
)
def test_the_envelope_of_each_status(status, kind):
    assert envelope(HTTPStatus(status), "why", "field", "code") == {
        "error": {"message": "why", "type": kind, "param": "field", "code": "code"}
    }


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_body_of_another_content_type_is_told_what_is_allowed(client, kind):
    response = client.post("/typed", content=b'{"count": 1}', headers={"Content-Type": kind})

    assert response.status_code == 400
    error = response.json()["error"]
    assert "application/json" in error["message"]
    assert (error["param"], error["code"]) == (None, "invalid_request")
    assert client.post("/typed", json={"count": 1}).status_code == 200


def test_messages_are_bounded():
    assert envelope(HTTPStatus.BAD_REQUEST, "x" * MAX_MESSAGE)["error"]["message"] == (
        "x" * MAX_MESSAGE
    )
    message = envelope(HTTPStatus.BAD_REQUEST, "x" * (MAX_MESSAGE + 1))["error"]["message"]
    assert message == "x" * MAX_MESSAGE + "..."


@pytest.mark.parametrize(
    "text",
    ["\0" * 5000, '"' * 5000, "\\" * 5000, "\U0001f600" * 5000, "\ud800" * 5000, "\n\t\x7f" * 2000],
    ids=ascii,
)
def test_an_answer_is_short_and_can_be_sent_whatever_it_quotes(text):
    error = ApiError(HTTPStatus.BAD_REQUEST, text, param=text, code="code")
    assert len(error.response().body) <= 4096


@pytest.mark.parametrize(
    "text",
    [
        "cannot open /home/user/models/config.json, sorry",
        "<object at 0x7f12ab34cd56>",
        'Traceback (most recent call last):\n  File "/usr/lib/x.py", line 5, in run\n    run()',
        "see '/root/.cache/huggingface'",
        "in /opt/venv/lib/python3.11/site-packages/vllm/x.py:77",
    ],
)
def test_messages_tell_nothing_of_the_machine(text):
    message = envelope(HTTPStatus.INTERNAL_SERVER_ERROR, text)["error"]["message"]
    for private in (
        "/home",
        "0x7f",
        "Traceback",
        "File ",
        "/usr",
        "/root",
        "/opt",
        "site-packages",
    ):
        assert private not in message


@pytest.mark.parametrize(
    "text", ["GET /v1/calibrators lists them", "a/b and 1/2", "https://a.example/home/x", "/health"]
)
def test_what_looks_like_a_path_of_ours_stays(text):
    assert envelope(HTTPStatus.BAD_REQUEST, text)["error"]["message"] == text


def test_our_own_errors_keep_everything(client):
    response = client.get("/busy")
    assert response.status_code == 503
    assert response.headers["Retry-After"] == "5"
    assert response.json()["error"] == {
        "message": "busy",
        "type": "server_error",
        "param": "a.b",
        "code": "busy",
    }


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/count", 405, "method_not_allowed"),
        ("GET", "/raise/401", 401, "unauthorized"),
    ],
)
def test_errors_of_the_framework_come_in_the_envelope(client, method, path, status, code):
    response = client.request(method, path)
    assert response.status_code == status
    error = response.json()["error"]
    assert error["code"] == code
    assert set(error) == {"message", "type", "param", "code"}
    if status == 405:
        assert response.headers["Allow"] == "POST"
    if status == 401:
        assert (error["message"], response.headers["X-Reason"]) == ("said so", "test")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"count": "many"}', "count"),
        (b'{"count": 1, "inner": {"a": "b"}}', "inner.a"),
        (b"{}", "count"),
    ],
)
def test_a_body_that_does_not_fit_names_the_field(client, body, param):
    response = client.post("/count", content=body, headers={"Content-Type": "application/json"})
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert (error["param"], error["code"]) == (param, "invalid_request")
    assert error["message"].startswith(f"{param}: ")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff"])
def test_a_body_that_is_no_object_is_a_bad_request(client, body):
    response = client.post("/count", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_errors_of_vllm_come_in_our_envelope():
    theirs = JSONResponse(
        {"error": {"message": "no such model", "type": "NotFoundError", "param": "m", "code": 404}},
        404,
    )
    ours = in_our_envelope(theirs)
    assert ours.status_code == 404
    assert json.loads(ours.body)["error"] == {
        "message": "no such model",
        "type": "not_found_error",
        "param": "m",
        "code": "not_found",
    }


@pytest.mark.parametrize(
    "response",
    [
        JSONResponse({"error": {"message": "in a sound answer"}}, 200),
        JSONResponse({"detail": "another shape"}, 400),
        JSONResponse({"error": "a word"}, 401),
        PlainTextResponse("text", 500),
    ],
)
def test_anything_else_stays_as_it_is(response):
    assert in_our_envelope(response) is response


def broken(module, error):
    """An error as code of `module` raises it."""
    space = {"__name__": module, "error": error}
    exec("def read():\n    raise error", space)
    try:
        space["read"]()
    except type(error) as caught:
        return caught


@pytest.mark.parametrize("error", [AssertionError(), IndexError("/etc/passwd"), AttributeError()])
def test_what_breaks_vllms_readers_is_the_clients_fault(error):
    caught = broken("vllm.renderers.chat_utils", error)
    response = asyncio.run(errors.handle_unreadable(None, caught))
    assert response.status_code == 400
    assert json.loads(response.body)["error"]["code"] == "invalid_request"
    assert b"passwd" not in response.body


@pytest.mark.parametrize("module", ["vllm.v1.engine.async_llm", "server.admission", "vllm"])
def test_what_breaks_elsewhere_is_not(module):
    with pytest.raises(AssertionError):
        asyncio.run(errors.handle_unreadable(None, broken(module, AssertionError())))
