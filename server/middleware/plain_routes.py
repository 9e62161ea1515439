"""Refuse `calibration` on routes that cannot honour it.

vLLM's request models accept unknown fields, so that `/v1/responses` and others would answer such
a request plainly and in silence.
"""

from __future__ import annotations

import json
from collections.abc import Set
from http import HTTPStatus

from starlette.types import ASGIApp, Receive, Scope, Send

from server.admission import FIELD, OFF
from server.errors import INVALID_CALIBRATION, ApiError
from server.middleware import body
from server.middleware.paths import path_of


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
        if (
            scope["type"] != "http"
            or scope["method"] != "POST"
            or path_of(scope) in self.calibrated
        ):
            await self.app(scope, receive, send)
            return
        messages = await body.read(receive)
        if _asks(body.content(messages)):
            error = ApiError(
                HTTPStatus.BAD_REQUEST,
                f"this route does not take {FIELD}; {' and '.join(sorted(self.calibrated))} do",
                param=FIELD,
                code=INVALID_CALIBRATION,
            )
            await error.response()(scope, receive, send)
            return
        await self.app(scope, body.replay(messages, receive), send)


def _asks(sent: bytes) -> bool:
    # A key may be spelled with escapes or in UTF-16: only without both is the short cut safe.
    if FIELD.encode() not in sent and b"\\" not in sent and b"\0" not in sent:
        return False
    try:
        content = json.loads(sent)
    except ValueError:
        return False
    return isinstance(content, dict) and content.get(FIELD) not in (None, OFF)
