"""HTTP/1.1 connections that end when a client is too slow or sends too much.

uvicorn bounds neither the time headers may take nor the time of a body, and with httptools, its
first choice, not even the size of headers. This is its h11 protocol with a clock.
"""

from __future__ import annotations

import asyncio
import json
from enum import Enum, auto
from functools import partial
from http import HTTPStatus
from typing import Any

import h11
from uvicorn import config as uvicorn_config
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.errors import envelope
from server.limits import Limits

# After an answer that came before the end of the body: as much is still read and thrown away, so
# that a client that is about to finish finds the answer and not a broken connection.
LINGER_BYTES = 64 * 1024
LINGER_SECONDS = 1.0
# What a client may take to read the end of its answer from a server that is about to go. uvicorn
# itself waits without a limit.
FAREWELL_SECONDS = 2


class Phase(Enum):
    """What a connection waits for, where it may not wait for ever."""

    HEADERS = auto()
    BODY = auto()
    LEFTOVER = auto()


class BoundedProtocol(H11Protocol):
    """uvicorn's h11 protocol, with deadlines for headers and bodies and errors in our envelope.

    Deadlines are of the whole phase: a byte now and then does not move them.

    Args:
        limits: the deadlines.
        kwargs: of uvicorn.
    """

    def __init__(self, limits: Limits, **kwargs: Any) -> None:  # noqa: ANN401 - uvicorn's
        super().__init__(**kwargs)
        if self.config.timeout_graceful_shutdown is None:
            self.config.timeout_graceful_shutdown = FAREWELL_SECONDS
        self._seconds = {
            Phase.HEADERS: limits.header_timeout,
            Phase.BODY: limits.body_timeout,
            Phase.LEFTOVER: LINGER_SECONDS,
        }
        self._phase: Phase | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._leftover = 0
        self._upgraded = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._enter(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._phase is Phase.LEFTOVER:
            self._leftover += len(data)
            if self._leftover > LINGER_BYTES:
                self.transport.close()
                return
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self._upgraded = True
        self._enter(None)
        super().handle_websocket_upgrade(event)

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's signature
        limit = self.config.h11_max_incomplete_event_size
        kept = len(self.conn.trailing_data[0])
        if limit is not None and kept > limit:
            status, text = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "the headers are too long"
            self._refuse(status, text, "headers_too_large")
        else:
            self._refuse(HTTPStatus.BAD_REQUEST, "this is not HTTP/1.1", "invalid_http")

    def _watch(self) -> None:
        """Set the clock if the connection waits for something else than before."""
        phase = self._waits_for()
        if phase is not self._phase:
            self._enter(phase)

    def _waits_for(self) -> Phase | None:
        theirs, ours = self.conn.their_state, self.conn.our_state
        if self._upgraded or self.transport.is_closing():
            return None
        if theirs is h11.IDLE:
            # Between requests uvicorn's own keep-alive clock runs.
            return Phase.HEADERS if self.timeout_keep_alive_task is None else None
        if theirs is h11.SEND_BODY:
            return Phase.LEFTOVER if ours is h11.DONE else Phase.BODY
        return None

    def _enter(self, phase: Phase | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._phase, self._leftover, self._deadline = phase, 0, None
        if phase is not None:
            self._deadline = self.loop.call_later(self._seconds[phase], self._too_late)

    def _too_late(self) -> None:
        silent = self._phase is Phase.HEADERS and not self.conn.trailing_data[0]
        if silent or self._phase is Phase.LEFTOVER:
            self.transport.close()
        else:
            self._refuse(
                HTTPStatus.REQUEST_TIMEOUT, "the request took too long to arrive", "request_timeout"
            )

    def _asks_for_headers_alone(self) -> bool:
        return self.conn.our_state is h11.SEND_RESPONSE and self.scope["method"] == "HEAD"

    def _refuse(self, status: HTTPStatus, message: str, code: str) -> None:
        """Answer in the application's place, if it has not begun to, and close."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(envelope(status, message, code=code)).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            start = h11.Response(status_code=status, headers=headers, reason=status.phrase)
            content = [] if self._asks_for_headers_alone() else [h11.Data(data=body)]
            for event in (start, *content, h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def select(limits: Limits) -> None:
    """Have uvicorn use this protocol where it is left to choose, as vLLM leaves it.

    It would take httptools where that is installed.
    """
    uvicorn_config.HTTP_PROTOCOLS["auto"] = partial(BoundedProtocol, limits)  # type: ignore[assignment]
