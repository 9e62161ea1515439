"""One id per request, in its answer and in what vLLM makes of it."""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "X-Request-Id"
_NAME = HEADER.lower().encode()
_SANE = re.compile(rb"[A-Za-z0-9._-]{1,128}")


class RequestIdMiddleware:
    """Echoes `X-Request-Id`, and makes one up where there is none that can be echoed.

    vLLM reads the header, so that the id of its answer and its log carry the same one. An id that
    is not sane is replaced: it is no reason to refuse work, and the answer tells the id that
    counts.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        given = [value for name, value in scope["headers"] if name == _NAME]
        sane = len(given) == 1 and _SANE.fullmatch(given[0]) is not None
        identity = given[0] if sane else uuid.uuid4().hex.encode()
        others = [header for header in scope["headers"] if header[0] != _NAME]
        scope = {**scope, "headers": [*others, (_NAME, identity)]}

        async def echoing(message: Message) -> None:
            if message["type"] == "http.response.start":
                message.setdefault("headers", [])
                MutableHeaders(scope=message)[HEADER] = identity.decode()
            await send(message)

        await self.app(scope, receive, echoing)
