"""The last word on errors: one envelope, bounded, whoever answered."""

from __future__ import annotations

import json
from collections.abc import Set
from http import HTTPStatus
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ApiError
from server.middleware.paths import path_of
from server.middleware.request_log import FAILED, record_of

# What is kept of an answer to look at. A longer one is replaced unread.
_MAX_SEEN = 64 * 1024
_REPLACED = frozenset({b"content-length", b"content-type"})
_EVENTS = "text/event-stream"
# How vLLM writes an error in a stream. Within a string the quotes would be escaped.
_ERROR_EVENT = b'data: {"error":'
_END = b"\n\n"
# Where trying again later may help, an answer says when.
_LATER = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
RETRY_AFTER_SECONDS = "1"


class EnvelopeMiddleware:
    """Puts errors of every router, middleware and mounted application into our envelope.

    In a stream these are events, which vLLM writes in one piece each.

    Args:
        app: what it wraps.
        exempt: paths whose errors have a form of their own.
    """

    def __init__(self, app: ASGIApp, exempt: Set[str] = frozenset()) -> None:
        self.app = app
        self.exempt = exempt

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or path_of(scope) in self.exempt:
            await self.app(scope, receive, send)
            return
        await self.app(scope, receive, _Enveloped(scope, receive, send).send)


class _Enveloped:
    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._start: Message | None = None
        self._streaming = False
        self._body = bytearray()

    async def send(self, message: Message) -> None:
        kind = message["type"]
        if kind == "http.response.start" and message["status"] >= HTTPStatus.BAD_REQUEST:
            self._start = message
        elif kind == "http.response.start":
            self._streaming = is_stream(message)
            await self._send(message)
        elif self._start is None or kind != "http.response.body":
            if self._streaming and _ERROR_EVENT in message.get("body", b""):
                message = {**message, "body": _events(message["body"])}
                record_of(self._scope).outcome = FAILED
            await self._send(message)
        else:
            if len(self._body) <= _MAX_SEEN:
                self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._answer(self._start)

    async def _answer(self, start: Message) -> None:
        self._start = None
        headers = [h for h in start.get("headers", []) if h[0].lower() not in _REPLACED]
        kept = dict(Headers(raw=headers).items())
        if start["status"] in _LATER:
            kept.setdefault("retry-after", RETRY_AFTER_SECONDS)
        response = _error(start["status"], bytes(self._body), kept).response()
        await response(self._scope, self._receive, self._send)


def is_stream(start: Message) -> bool:
    """Whether an answer that starts so is a stream of events."""
    return Headers(raw=start.get("headers", [])).get("content-type", "").startswith(_EVENTS)


def _events(body: bytes) -> bytes:
    return _END.join(
        _error_event(event) if event.startswith(_ERROR_EVENT) else event
        for event in body.split(_END)
    )


def _error_event(event: bytes) -> bytes:
    content = event.removeprefix(b"data: ")
    code = _found(content).get("code")
    status = code if isinstance(code, int) else HTTPStatus.INTERNAL_SERVER_ERROR
    return b"data: " + bytes(_error(status, content, {}).response().body)


def _error(code: int, body: bytes, headers: dict[str, str]) -> ApiError:
    status = _status(code)
    found = _found(body)
    message, param, name = (found.get(key) for key in ("message", "param", "code"))
    return ApiError(
        status,
        message if isinstance(message, str) and message else f"{status.phrase}.",
        param=param if isinstance(param, str) else None,
        code=name if isinstance(name, str) else status.name.lower(),
        headers=headers,
    )


def _status(code: int) -> HTTPStatus:
    try:
        return HTTPStatus(code)
    except ValueError:
        return HTTPStatus.INTERNAL_SERVER_ERROR


def _found(body: bytes) -> dict[str, Any]:
    """The error object of an answer, in the forms that vLLM's routes and libraries use."""
    try:
        content = json.loads(body) if len(body) <= _MAX_SEEN else None
    except (ValueError, RecursionError):
        return {}
    error = content.get("error", content.get("detail")) if isinstance(content, dict) else None
    return error if isinstance(error, dict) else {"message": error}
