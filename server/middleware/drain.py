"""Refuse new work while the server drains; probes and metrics stay open."""

from __future__ import annotations

import time
from collections.abc import Callable
from http import HTTPStatus

from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import ApiError
from server.middleware.paths import OPEN_PATHS, path_of

RETRY_AFTER_SECONDS = "5"
POLL_SECONDS = 0.02


class Gate:
    """Requests are let in until it is closed, and counted until their answers are out.

    Requests come in on the event loop; any thread may close the gate and wait.

    Attributes:
        closed: whether new requests are refused.
        inside: requests that were let in and are not answered yet.
    """

    def __init__(self) -> None:
        self.closed = False
        self.inside = 0

    def close(self, seconds: float) -> None:
        """Let nobody in from now on, and wait `seconds` at most until all inside are answered.

        The engine takes nothing new once it has been told to stop, and a request that was let in
        may still be on its way there: its images are being read, or its text pass runs.
        """
        self.closed = True
        deadline = time.monotonic() + seconds
        while self.inside and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)


class DrainMiddleware:
    """Answers 503 with `Retry-After` once the gate is closed.

    Args:
        app: what it wraps.
        gate: the gate that requests come in through.
    """

    def __init__(self, app: ASGIApp, gate: Callable[[], Gate]) -> None:
        self.app = app
        self.gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or path_of(scope) in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        gate = self.gate()
        # Counted before the gate is looked at, so that whoever closes it misses nobody.
        gate.inside += 1
        try:
            await (_refusal if gate.closed else self.app)(scope, receive, send)
        finally:
            gate.inside -= 1


async def _refusal(scope: Scope, receive: Receive, send: Send) -> None:
    error = ApiError(
        HTTPStatus.SERVICE_UNAVAILABLE,
        "the server is shutting down and takes no new requests",
        code="draining",
        headers={"Retry-After": RETRY_AFTER_SECONDS},
    )
    await error.response()(scope, receive, send)
