"""Many clients at once, and how their answers end."""

from __future__ import annotations

import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

from tests.integration.serving import Server

DONE = "data: [DONE]"


@dataclass(frozen=True)
class Answer:
    """What a client got.

    Attributes:
        status: of HTTP; 0 where there was no answer.
        text: the body.
        at: when it ended, by the clock of `time.monotonic`.
    """

    status: int
    text: str
    at: float

    @property
    def error(self) -> Any:
        """The one error: the body, or an event of the stream; None without one."""
        events = [part for part in self.text.split("\n\n") if part.startswith('data: {"error"')]
        if self.status != 200:
            return json.loads(self.text)["error"]
        return json.loads(events[0].removeprefix("data: "))["error"] if events else None

    @property
    def done(self) -> bool:
        """Whether it is complete: a stream to its last line, a plain answer with status 200."""
        streamed = self.text.startswith("data: ")
        return self.status == 200 and (not streamed or self.text.rstrip().endswith(DONE))


class Callers:
    """Clients in threads of their own.

    Args:
        server: that all of them ask.
        number: at most as many at once.
    """

    def __init__(self, server: Server, number: int) -> None:
        self._server = server
        self._pool = ThreadPoolExecutor(number)

    def ask(self, **body: Any) -> Future[Answer]:
        """Send a completion."""
        usual = {"prompt": "hello", "temperature": 0, "ignore_eos": True}
        return self._pool.submit(self._ask, usual | body)

    def _ask(self, body: dict[str, Any]) -> Answer:
        try:
            with self._server.client() as client:
                response = client.post("/v1/completions", json=body)
        except httpx.TransportError as error:
            return Answer(0, repr(error), time.monotonic())
        return Answer(response.status_code, response.text, time.monotonic())

    def close(self) -> None:
        """Wait for all."""
        self._pool.shutdown()
