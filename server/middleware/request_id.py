"""One id per request, in its answer and in what vLLM makes of it."""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "X-Request-Id"
# Where routes find the `Identity` in their scope.
SCOPE = "trimtab.request_id"
SANE = re.compile(r"[A-Za-z0-9._-]{1,128}")
_NAME = HEADER.lower().encode()


@dataclass(slots=True)
class Identity:
    """The id of a request.

    Attributes:
        value: what the answer will carry.
        given: whether it came in the header, which then counts more than the body.
    """

    value: str
    given: bool


class RequestIdMiddleware:
    """Echoes `X-Request-Id`, and makes one up where there is none that can be echoed.

    vLLM reads the header, so that the id of its answer and its log carry the same one. An id that
    is not sane is replaced: it is no reason to refuse work, and the answer tells the id that
    counts. A made-up id does not become a header: to vLLM that would count more than an id in the
    body. Routes find it in their scope and may set it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        values = [value.decode("latin-1") for name, value in scope["headers"] if name == _NAME]
        given = len(values) == 1 and SANE.fullmatch(values[0]) is not None
        identity = Identity(values[0] if given else uuid.uuid4().hex, given)
        if not given:
            headers = [header for header in scope["headers"] if header[0] != _NAME]
            scope = {**scope, "headers": headers}

        async def echoing(message: Message) -> None:
            if message["type"] == "http.response.start":
                message.setdefault("headers", [])
                MutableHeaders(scope=message)[HEADER] = identity.value
            await send(message)

        await self.app({**scope, SCOPE: identity}, receive, echoing)
