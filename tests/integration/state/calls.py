"""Requests whose answers are compared, and clients that hang up."""

from __future__ import annotations

import http.client
import json
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import httpx

from tests.integration.serving import Server

PATIENCE = 60.0
SETTING = {"method": "zerotuning", "gamma": 0.3}
OUTCOMES = ("applied", "skipped", "rejected", "failed")


def prompt(seed: int, length: int) -> list[int]:
    """Token ids that no other seed shares a prefix with."""
    return [1000 + (seed * 7919 + i * i * 31 + i) % 40000 for i in range(length)]


def body(tokens: Any, calibration: Any = None, **fields: Any) -> dict[str, Any]:
    """A completion that goes on to its last token."""
    usual = {"max_tokens": 12, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    usual |= {"prompt": tokens, "calibration": calibration, "return_token_ids": True}
    return usual | fields


def complete(server: Server, request: dict[str, Any], **headers: str) -> Any:
    """The whole answer."""
    with server.client() as client:
        response = client.post("/v1/completions", json=request, headers=headers)
    assert response.status_code == 200, response.text
    return response.json()


def streamed(server: Server, request: dict[str, Any]) -> list[Any]:
    """The events of a streamed answer."""
    asked = {**request, "stream": True, "stream_options": {"include_usage": True}}
    with server.client() as client:
        response = client.post("/v1/completions", json=asked)
    assert response.status_code == 200, response.text
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def applied(answer: Any) -> Any:
    """The one entry of an answer's receipt."""
    (entry,) = answer["calibration"]["applied"]
    return entry


def counts(answer: Any) -> tuple[int, int]:
    """Calibrated prompt and completion tokens."""
    entry = applied(answer)
    return entry["prompt_tokens"], entry["completion_tokens"]


class Caller:
    """A client on a connection of its own that hangs up when it is told to."""

    def __init__(self, server: Server, request: dict[str, Any], **headers: str) -> None:
        url = httpx.URL(server.url)
        self._connection = http.client.HTTPConnection(url.host, url.port, timeout=PATIENCE)
        headers = {"Content-Type": "application/json", **headers}
        self._connection.request("POST", "/v1/completions", json.dumps(request), headers)
        self._response: http.client.HTTPResponse | None = None

    def events(self, count: int) -> list[Any]:
        """The next events of a stream; fewer where it ends."""
        if self._response is None:
            self._response = self._connection.getresponse()
        found: list[Any] = []
        for line in self._response:
            if line.startswith(b"data: {"):
                found.append(json.loads(line.removeprefix(b"data: ")))
            if len(found) == count:
                break
        return found

    def hang_up(self) -> None:
        """Close the connection."""
        if self._response is not None:
            self._response.close()
        self._connection.close()

    def break_off(self) -> None:
        """Reset the connection, as a process does that is killed with something left to read."""
        assert self._connection.sock is not None
        linger = struct.pack("ii", 1, 0)
        self._connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.hang_up()


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Ask again and again, for a limited time; once more if that went by in one's sleep."""
    deadline = time.monotonic() + PATIENCE
    late = False
    while not condition():
        assert not late, f"in vain for {PATIENCE} seconds: {what}"
        time.sleep(0.01)
        late = time.monotonic() > deadline


def wait_until_idle(server: Server) -> None:
    """Until nobody is being served, as the gauges tell."""
    gauges = ("trimtab_active_requests", "vllm:num_requests_running", "vllm:num_requests_waiting")
    for gauge in gauges:
        wait_until(lambda gauge=gauge: server.metric(gauge) == 0, f"{gauge} is not 0")


def outcomes(server: Server) -> dict[str, float]:
    """Calibrated requests so far, by outcome."""
    return {name: server.metric("trimtab_requests_total", outcome=name) for name in OUTCOMES}


def growth(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """What has changed."""
    return {name: after[name] - before[name] for name in after if after[name] != before[name]}


def settled(server: Server) -> tuple[list[Any], Any]:
    """What an idle server answers to two requests, and how much it then holds."""
    wait_until_idle(server)
    requests = [body(prompt(1, 40), setting, max_tokens=6) for setting in (SETTING, None)]
    answers = [complete(server, request)["choices"] for request in requests]
    wait_until_idle(server)
    with server.client() as client:
        sizes = client.get("/sizes").json()
    return answers, {name: sizes[name]["tables"] for name in sizes}
