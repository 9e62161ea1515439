"""The server as it runs: which HTTP protocol it speaks, and what it says of itself."""

from __future__ import annotations

import json
import socket

import pytest


def exchange(server, sent):
    """What comes back for some bytes, until the server closes."""
    address = ("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
    found = b""
    with socket.create_connection(address, timeout=30) as connection:
        connection.sendall(sent)
        while piece := connection.recv(65536):
            found += piece
    head, _, body = found.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b"\x00\r\n\r\n", (400, "invalid_http")),
        (b"GET /health HTTP/1.1\r\nHost: " + b"a" * 100_000, (431, "headers_too_large")),
    ],
    ids=["no HTTP", "long headers"],
)
def test_the_protocol_is_the_one_that_holds_its_limits(server, sent, expected):
    assert exchange(server, sent) == expected


def test_a_request_has_one_id_in_header_and_answer(server, name):
    body = {"model": name, "prompt": "Hi", "max_tokens": 1}
    with server.client() as client:
        response = client.post("/v1/completions", json=body, headers={"X-Request-Id": "mine-1"})
    assert response.headers.get_list("X-Request-Id") == ["mine-1"]
    assert response.json()["id"] == "cmpl-mine-1"


def test_a_stream_passes_through_all_layers(server, name):
    body = {"model": name, "prompt": "Hi", "max_tokens": 3, "stream": True}
    with server.client() as client, client.stream("POST", "/v1/completions", json=body) as response:
        lines = [line for line in response.iter_lines() if line]
    assert response.status_code == 200
    assert lines[-1] == "data: [DONE]"
    assert len(lines) > 2


def test_what_goes_beyond_a_limit_never_reaches_the_engine(server, name):
    before = server.metric("vllm:request_success_total")
    with server.client() as client:
        for more in ({"n": 17}, {"stop": ["a"] * 5}, {"prompt_embeds": "gASV"}):
            response = client.post("/v1/completions", json={"model": name, "prompt": "Hi"} | more)
            assert response.status_code == 400
            assert next(iter(more)) == response.json()["error"]["param"]
    assert server.metric("vllm:request_success_total") == before
    assert server.metric("http_requests_total", status="4xx") >= 3
