"""Bound the headers of a request, by bytes and by number.

The HTTP parser bounds only what it has to keep while headers are incomplete: a block that arrives
in one read passes it.
"""

from __future__ import annotations

from http import HTTPStatus

from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import ApiError


class HeaderLimitMiddleware:
    """Answers 431 where the headers are too long or too many.

    Args:
        app: what it wraps.
        max_bytes: names, values and target together.
        max_count: headers.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_count: int) -> None:
        if max_bytes < 1 or max_count < 1:
            raise ValueError("limits of headers have to be positive")
        self.app = app
        self.max_bytes = max_bytes
        self.max_count = max_count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._fits(scope):
            await self.app(scope, receive, send)
            return
        error = ApiError(
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
            f"at most {self.max_count} headers and {self.max_bytes} bytes of them are allowed",
            code="headers_too_large",
        )
        await error.response()(scope, receive, send)

    def _fits(self, scope: Scope) -> bool:
        headers = scope["headers"]
        size = sum(len(name) + len(value) for name, value in headers)
        target = len(scope.get("raw_path") or b"") + len(scope.get("query_string", b""))
        return len(headers) <= self.max_count and size + target <= self.max_bytes
