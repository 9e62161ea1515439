"""Refuse new work while the server drains; probes and metrics stay open."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus

from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import ApiError
from server.middleware.paths import OPEN_PATHS, path_of

RETRY_AFTER_SECONDS = "5"


class DrainMiddleware:
    """Answers 503 with `Retry-After` once `draining()` is true.

    Args:
        app: what it wraps.
        draining: whether shutdown has begun.
    """

    def __init__(self, app: ASGIApp, draining: Callable[[], bool]) -> None:
        self.app = app
        self.draining = draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or path_of(scope) in OPEN_PATHS or not self.draining():
            await self.app(scope, receive, send)
            return
        error = ApiError(
            HTTPStatus.SERVICE_UNAVAILABLE,
            "the server is shutting down and takes no new requests",
            code="draining",
            headers={"Retry-After": RETRY_AFTER_SECONDS},
        )
        await error.response()(scope, receive, send)
