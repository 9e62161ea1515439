"""Refuse bodies that ask for too much, before any route reads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from math import isfinite
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from server.admission import FIELD
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
    odd: list[str] = []
    try:
        content = json.loads(
            sent,
            parse_constant=lambda text: _noted(text, odd),
            parse_float=lambda text: _noted(text, odd),
        )
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    except ValueError:
        # Python reads whole numbers of up to 4,300 digits.
        raise _error("the body holds a number that is too long") from None
    except RecursionError:
        raise _error("the body is nested too deep") from None
    if odd:
        _refuse_odd(content)
    return content


def _noted(text: str, odd: list[str]) -> float:
    value = float(text)
    if not isfinite(value):
        odd.append(text)
    return value


def _refuse_odd(content: object) -> None:
    for path, value in _numbers(content):
        if not isfinite(value):
            raise _error(f"{path or 'the body'} is no finite number", path)


def _numbers(content: object) -> Iterator[tuple[str | None, float]]:
    """Paths of floats, but those in `calibration`, of which admission has more to say."""
    pending: list[tuple[str | None, object]] = [(None, content)]
    while pending:
        path, value = pending.pop()
        if isinstance(value, float):
            yield path, value
        elif isinstance(value, list):
            pending.extend((f"{path or ''}[{index}]", each) for index, each in enumerate(value))
        elif isinstance(value, dict):
            prefix = "" if path is None else f"{path}."
            own = path is None
            pending.extend((prefix + k, each) for k, each in value.items() if not own or k != FIELD)


def _error(message: str, param: str | None = None) -> ApiError:
    return ApiError(HTTPStatus.BAD_REQUEST, message, param=param, code="invalid_request")
