"""API keys: every route needs one, but those that are named."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence, Set
from contextvars import ContextVar
from http import HTTPStatus

from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import ApiError
from server.middleware.paths import path_of

# Where the digest of the key lies that a request came with.
TENANT = "trimtab.tenant"
# The same, for what sees no scope. Each request has a task of its own, and so a context.
CURRENT: ContextVar[str | None] = ContextVar("tenant", default=None)
_POLICY_VIOLATION = 1008


class KeyMiddleware:
    """Answers 401 where a request brings no valid key.

    Args:
        app: what it wraps.
        keys: those that are valid.
        open_paths: paths that need none. There are no open prefixes and no open methods.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], open_paths: Set[str]) -> None:
        if not keys or not all(keys):
            raise ValueError("there has to be a key, and none may be empty")
        self.app = app
        self.open_paths = open_paths
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or self._open(scope):
            await self.app(scope, receive, send)
            return
        digest = self._verified(scope["headers"])
        if digest is not None:
            CURRENT.set(digest.hex())
            await self.app({**scope, TENANT: digest.hex()}, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION})
        else:
            await _refusal().response()(scope, receive, send)

    def _open(self, scope: Scope) -> bool:
        return scope["type"] == "http" and path_of(scope) in self.open_paths

    def _verified(self, headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
        """Digest of the key a request came with, None if it is not one of ours."""
        given = [value for name, value in headers if name == b"authorization"]
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        if scheme.lower() != b"bearer":
            return None
        digest = _digest(key.strip())
        # All of them, so that the time does not tell which one it was.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return digest if any(matches) else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _refusal() -> ApiError:
    return ApiError(
        HTTPStatus.UNAUTHORIZED,
        "this server needs a valid API key: Authorization: Bearer KEY",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )
