"""Bound the time a request may take, from its headers to the last byte of its answer."""

from __future__ import annotations

import asyncio
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ApiError
from server.middleware.envelope import is_stream


class TimeLimitMiddleware:
    """Answers 504 when `seconds` are over; what works on the request is cancelled.

    A stream of events that has begun ends with an error event. Anything else that has begun is
    broken off, so that nobody takes it for complete.

    Args:
        app: what it wraps.
        seconds: the limit.
    """

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        if not seconds > 0:
            raise ValueError(f"nothing is done in {seconds} seconds")
        self.app = app
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start: Message | None = None

        async def noting(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
            await send(message)

        try:
            async with asyncio.timeout(self.seconds) as clock:
                await self.app(scope, receive, noting)
        except TimeoutError:
            if not clock.expired() or (start is not None and not is_stream(start)):
                raise
            await self._end(start, scope, receive, send)

    async def _end(self, start: Message | None, scope: Scope, receive: Receive, send: Send) -> None:
        response = self._error().response()
        if start is None:
            await response(scope, receive, send)
            return
        events = b"data: " + bytes(response.body) + b"\n\ndata: [DONE]\n\n"
        await send({"type": "http.response.body", "body": events})

    def _error(self) -> ApiError:
        return ApiError(
            HTTPStatus.GATEWAY_TIMEOUT,
            f"the request took longer than {self.seconds:g} seconds, the limit of this server",
            code="timeout",
            # OpenAI's clients would send the same work again, twice.
            headers={"X-Should-Retry": "false"},
        )
