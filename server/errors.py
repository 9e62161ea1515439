"""Errors a client sees: one OpenAI-shaped envelope."""

from __future__ import annotations

import json
import logging
import re
from http import HTTPStatus
from traceback import walk_tb
from typing import TYPE_CHECKING, Any

from fastapi.responses import JSONResponse
from starlette.responses import Response

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fastapi import Request
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException

logger = logging.getLogger(__name__)
INVALID_CALIBRATION = "invalid_calibration"
# A message repeats parts of the request; this bounds what a small request can make us send.
MAX_MESSAGE = 1000
MAX_PARAM = 200
# Bytes are bounded too: with both, an answer stays under 4 KiB whatever is quoted in it.
_MAX_BYTES = 2000
# What an exception may tell of the machine. No pattern can match in two ways, so all are linear.
_PRIVATE = (
    (re.compile(r"\bTraceback \(most recent call last\):?"), ""),
    (re.compile(r'File "[^"]*", line \d+(, in \w+)?'), ""),
    (re.compile(r"EngineCore encountered an issue\. See stack trace .*"), "the engine has died"),
    (re.compile(r"\b0x[0-9a-fA-F]{4,}"), "<address>"),
    (
        re.compile(
            r"(?<![\w/.])/(?:app|etc|home|lib|mnt|opt|proc|root|srv|sys|tmp|usr|var|work|workspace)"
            r"/[^\s'\",;:)\]]+"
        ),
        "<path>",
    ),
)

_TYPES = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
}


# Where vLLM makes prompts of requests, and what its code raises there beside what it means to.
READERS = ("vllm.renderers.", "vllm.entrypoints.openai.responses.utils")
BROKEN = (AssertionError, AttributeError, LookupError)


class ApiError(Exception):
    """An error on its way to the client.

    Args:
        status: HTTP status.
        message: one sentence for a person, without paths, addresses or tracebacks.
        param: offending field of the request, dotted.
        code: machine-readable reason.
        headers: of the response.
    """

    def __init__(
        self,
        status: HTTPStatus,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers

    def response(self) -> JSONResponse:
        """The envelope."""
        return JSONResponse(
            envelope(self.status, self.message, self.param, self.code),
            self.status,
            headers=self.headers,
        )


def envelope(
    status: HTTPStatus, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """`{"error": {"message", "type", "param", "code"}}`."""
    message = bounded(message, MAX_MESSAGE)
    param = None if param is None else bounded(param, MAX_PARAM)
    fallback = "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else None
    kind = _TYPES.get(status) or fallback or "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def bounded(text: str, limit: int) -> str:
    """At most `limit` characters that every client can print, with nothing of the machine."""
    cut = text[:limit].encode("utf-8", "replace")[:_MAX_BYTES].decode("utf-8", "ignore")
    cut = "".join(c if c.isprintable() else " " for c in cut)
    for pattern, instead in _PRIVATE:
        cut = pattern.sub(instead, cut)
    return cut if len(text) <= limit else cut + "..."


async def handle_api_error(_: Request, error: ApiError) -> JSONResponse:
    """Answer an `ApiError`."""
    return error.response()


async def handle_http_exception(_: Request, error: HTTPException) -> JSONResponse:
    """Answer what the framework raises: 404, 405 and the like."""
    status = HTTPStatus(error.status_code)
    return JSONResponse(
        envelope(status, str(error.detail), code=status.name.lower()),
        status,
        headers=error.headers,
    )


async def handle_validation_error(_: Request, error: RequestValidationError) -> JSONResponse:
    """Answer a body that does not fit the schema, naming the first offending field."""
    first = error.errors()[0]
    if isinstance(first, str):
        # vLLM's check of the content type raises the same error around a sentence.
        first = {"type": "json_invalid", "msg": first}
    param = None if first["type"] == "json_invalid" else _path(first["loc"])
    status = HTTPStatus.BAD_REQUEST
    message = f"{param}: {first['msg']}" if param else str(first["msg"])
    return JSONResponse(envelope(status, message, param, "invalid_request"), status)


async def handle_unreadable(_: Request, error: Exception) -> JSONResponse:
    """Answer what breaks vLLM's readers of requests: they assert and index what a client sent.

    Anything else that broke is none of the client's business, and goes on to the last handler.
    """
    modules = (frame.f_globals["__name__"] for frame, _ in walk_tb(error.__traceback__))
    theirs = [module for module in modules if module.startswith("vllm.")]
    if not theirs or not theirs[-1].startswith(READERS):
        raise error
    logger.warning("a request could not be read", exc_info=error)
    status = HTTPStatus.BAD_REQUEST
    message = "no prompt can be made of this request: a message or one of its parts is odd"
    return JSONResponse(envelope(status, message, code="invalid_request"), status)


def _path(location: Sequence[int | str]) -> str | None:
    """Dotted path of a field, without the branches of unions such as `list[int]`."""
    parts = [str(part) for part in location if part != "body"]
    return ".".join(part for part in parts if "[" not in part) or None


def in_our_envelope(response: Response) -> Response:
    """vLLM's own errors with our types and codes; its message and param, anything else as it is."""
    if response.status_code < HTTPStatus.BAD_REQUEST or not isinstance(response, JSONResponse):
        return response
    error = json.loads(bytes(response.body)).get("error")
    if not isinstance(error, dict):
        return response
    status = HTTPStatus(response.status_code)
    body = envelope(status, error["message"], error.get("param"), status.name.lower())
    return replaced(response, body, status)


def replaced(response: Response, content: Any, status: HTTPStatus) -> JSONResponse:  # noqa: ANN401 - any JSON
    """`content` in place of what a handler answered.

    Headers stay, and so does the background task: with `--enable-server-load-tracking` vLLM counts
    a request as running until the task has run.
    """
    kept = {k: v for k, v in response.headers.items() if k != "content-length"}
    return JSONResponse(content, status, headers=kept, background=response.background)
