"""Refuse bodies that ask for too much, before any route reads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from http import HTTPStatus
from math import isfinite
from typing import Any, NoReturn

from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import ApiError
from server.middleware import body

METHODS = frozenset({"POST", "PUT", "PATCH", "DELETE"})
Check = Callable[[Mapping[str, Any]], None]


class RequestBoundsMiddleware:
    """Answers 400 where a body is JSON that one of `checks` refuses, or holds no finite number.

    A body that is not JSON is left to its route, which knows what it takes.

    Args:
        app: what it wraps.
        checks: called with the object; raise `ApiError`.
    """

    def __init__(self, app: ASGIApp, checks: tuple[Check, ...]) -> None:
        self.app = app
        self.checks = checks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in METHODS:
            await self.app(scope, receive, send)
            return
        messages = await body.read(receive)
        try:
            self._check(body.content(messages))
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self.app(scope, body.replay(messages, receive), send)

    def _check(self, sent: bytes) -> None:
        content = parse(sent)
        if isinstance(content, dict):
            for check in self.checks:
                check(content)


def parse(sent: bytes) -> object:
    """The JSON value of a body; None where it is not JSON.

    Raises:
        ApiError: a number is not finite, or too long to read, or the value is nested too deep.
    """
    try:
        return json.loads(sent, parse_constant=_refuse_number, parse_float=_float)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    except ValueError:
        # Python reads whole numbers of up to 4,300 digits.
        return _refuse_number("")
    except RecursionError:
        raise _error("the body is nested too deep") from None


def _float(text: str) -> float:
    value = float(text)
    return value if isfinite(value) else _refuse_number(text)


def _refuse_number(text: str) -> NoReturn:
    shown = f" {text[:20]}" if text else ""
    raise _error(f"the body holds the number{shown}, which is not finite or too long")


def _error(message: str) -> ApiError:
    return ApiError(HTTPStatus.BAD_REQUEST, message, code="invalid_request")
