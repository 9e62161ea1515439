"""Refuse work that would have to wait behind too much other work."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus

from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import ApiError
from server.middleware.envelope import RETRY_AFTER_SECONDS
from server.middleware.paths import OPEN_PATHS, path_of


class QueueMiddleware:
    """Answers 503 with `Retry-After` while as many requests are being served as are allowed.

    A request counts until the last byte of its answer is out. Probes and metrics do not count.

    Args:
        app: what it wraps.
        capacity: how many are allowed.
        refused: called for each that is refused.
    """

    def __init__(
        self, app: ASGIApp, capacity: Callable[[], int], refused: Callable[[], None]
    ) -> None:
        self.app = app
        self.capacity = capacity
        self.refused = refused
        self._served = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or path_of(scope) in OPEN_PATHS:
            await self.app(scope, receive, send)
        elif self._served >= self.capacity():
            self.refused()
            await _refusal().response()(scope, receive, send)
        else:
            await self._serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._served += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self._served -= 1


def _refusal() -> ApiError:
    return ApiError(
        HTTPStatus.SERVICE_UNAVAILABLE,
        "the server has as many requests as it can take; try again later",
        code="overloaded",
        headers={"Retry-After": RETRY_AFTER_SECONDS},
    )
