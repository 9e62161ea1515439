"""Refuse `calibration` on routes that cannot honour it.

vLLM's request models accept unknown fields, so that `/v1/responses` and others would answer such
a request plainly and in silence.
"""

from __future__ import annotations

import json
from collections.abc import Set
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.admission import FIELD, OFF
from server.errors import INVALID_CALIBRATION, ApiError


class PlainRoutesMiddleware:
    """Answers 400 where a JSON body asks for calibration outside the calibrated routes.

    Args:
        app: what it wraps.
        calibrated: paths that take the field.
    """

    def __init__(self, app: ASGIApp, calibrated: Set[str]) -> None:
        self.app = app
        self.calibrated = calibrated

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] in self.calibrated:
            await self.app(scope, receive, send)
            return
        messages = await _read(receive)
        if _asks(b"".join(message.get("body", b"") for message in messages)):
            error = ApiError(
                HTTPStatus.BAD_REQUEST,
                f"this route does not take {FIELD}; {' and '.join(sorted(self.calibrated))} do",
                param=FIELD,
                code=INVALID_CALIBRATION,
            )
            await error.response()(scope, receive, send)
            return
        await self.app(scope, _replay(messages, receive), send)


async def _read(receive: Receive) -> list[Message]:
    """Everything up to the end of the body, or to the client's disconnection."""
    messages = [await receive()]
    while messages[-1].get("more_body", False):
        messages.append(await receive())
    return messages


def _replay(messages: list[Message], receive: Receive) -> Receive:
    pending = iter(messages)

    async def replayed() -> Message:
        message = next(pending, None)
        return message if message is not None else await receive()

    return replayed


def _asks(body: bytes) -> bool:
    # A key may be spelled with escapes, so only their absence makes the short cut safe.
    if FIELD.encode() not in body and b"\\" not in body:
        return False
    try:
        content = json.loads(body)
    except ValueError:
        return False
    return isinstance(content, dict) and content.get(FIELD) not in (None, OFF)
