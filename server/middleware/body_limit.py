"""Bound what is read of a request's body, declared or chunked."""

from __future__ import annotations

from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ApiError


class BodyLimitMiddleware:
    """Answers 413 as soon as a body is known to be longer than `limit`.

    Args:
        app: what it wraps.
        limit: bytes.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"a limit of {limit} bytes lets no body through")
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self._declared(scope) > self.limit:
            await self._error().response()(scope, receive, send)
            return
        await self._counted(scope, receive, send)

    def _declared(self, scope: Scope) -> int:
        text = Headers(scope=scope).get("content-length", "")
        return int(text) if text.isdecimal() else 0

    async def _counted(self, scope: Scope, receive: Receive, send: Send) -> None:
        received, refused, started = 0, False, False

        async def counting() -> Message:
            nonlocal received, refused
            if refused:
                return {"type": "http.disconnect"}
            message = await receive()
            received += len(message.get("body", b""))
            if received <= self.limit:
                return message
            refused = True
            if not started:
                await self._error().response()(scope, receive, send)
            # Whoever reads gives up, and what it would answer is not sent.
            return {"type": "http.disconnect"}

        async def sending(message: Message) -> None:
            nonlocal started
            if not refused:
                started = True
                await send(message)

        try:
            await self.app(scope, counting, sending)
        except ClientDisconnect:
            if not refused:
                raise

    def _error(self) -> ApiError:
        return ApiError(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"the body is longer than {self.limit} bytes, the limit of this server",
            code="body_too_large",
        )
