"""One line of log per request: its id, how it was calibrated and how it ended.

What was asked and answered, and with which key, is not in it.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.middleware.paths import OPEN_PATHS, path_of
from server.middleware.request_id import SCOPE as IDENTITY

# Below vLLM's logger, so that its level, its handlers and its JSON are ours, too.
logger = logging.getLogger("vllm.trimtab.requests")
# Where whoever works on a request finds its `Record` in the scope.
SCOPE = "trimtab.record"
MAX_PATH = 200
ANSWERED, REJECTED, FAILED, LEFT = "answered", "rejected", "failed", "left"


@dataclass(slots=True)
class Record:
    """What is known of a request besides what its connection shows.

    Attributes:
        methods: it is calibrated with, as in `X-Calibration`.
        digest: of the calibration, as in the receipt.
        outcome: how it ended, where that is more than its status says.
    """

    methods: str | None = None
    digest: str | None = None
    outcome: str | None = None


def record_of(scope: Scope) -> Record:
    """The record of a request; one that nobody reads where nothing is logged."""
    record: Record = scope.get(SCOPE) or Record()
    return record


class RequestLogMiddleware:
    """Logs every request but those for probes and metrics, when it is over."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or path_of(scope) in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(receive, send)
        record, began = Record(), time.monotonic()
        try:
            await self.app({**scope, SCOPE: record}, exchange.receive, exchange.send)
        finally:
            fields = _fields(scope, record, exchange, time.monotonic() - began)
            shown = " ".join(f"{name}={value}" for name, value in fields.items())
            logger.info("request %s", shown, extra=fields)


class _Exchange:
    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self.status: int | None = None
        self.complete = False
        self.left = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self.complete:
            self.left = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message["type"] == "http.response.body":
            self.complete = self.complete or not message.get("more_body", False)
        await self._send(message)

    def outcome(self) -> str:
        if self.left:
            return LEFT
        if not self.complete or (self.status or 0) >= HTTPStatus.INTERNAL_SERVER_ERROR:
            return FAILED
        return REJECTED if (self.status or 0) >= HTTPStatus.BAD_REQUEST else ANSWERED


def _fields(scope: Scope, record: Record, exchange: _Exchange, seconds: float) -> dict[str, Any]:
    identity = scope.get(IDENTITY)
    fields = {
        "request_id": identity.value if identity else None,
        "http_method": quote(scope["method"])[:MAX_PATH],
        # Quoted, so that no path can look like another line.
        "path": quote(path_of(scope))[:MAX_PATH],
        "status": exchange.status,
        "seconds": round(seconds, 3),
        "calibration": record.methods,
        "digest": record.digest,
        "outcome": LEFT if exchange.left else record.outcome or exchange.outcome(),
    }
    return {name: value for name, value in fields.items() if value is not None}
