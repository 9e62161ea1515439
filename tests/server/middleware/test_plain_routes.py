"""Calibration asked for where it cannot be had."""

from __future__ import annotations

import json

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from server.middleware.plain_routes import PlainRoutesMiddleware

BODY = {"input": "Hi", "calibration": {"method": "zerotuning", "gamma": 2}}


@pytest.fixture
def client():
    app = FastAPI()

    @app.post("/v1/responses")
    @app.post("/v1/completions")
    async def echo(request: Request):
        return {"length": len(await request.body())}

    app.add_middleware(PlainRoutesMiddleware, calibrated=frozenset({"/v1/completions"}))
    return TestClient(app)


def test_refused_where_it_would_be_ignored(client):
    response = client.post("/v1/responses", json=BODY)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == ("calibration", "invalid_calibration")
    assert "/v1/completions" in error["message"]


def test_refused_however_the_key_is_spelled(client):
    body = json.dumps(BODY).replace("calibration", "\\u0063alibration")
    assert client.post("/v1/responses", content=body).status_code == 400


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_refused_however_the_body_is_encoded(client, encoding):
    body = json.dumps(BODY).encode(encoding)
    assert client.post("/v1/responses", content=body).status_code == 400


def test_calibrated_routes_get_the_body_untouched(client):
    response = client.post("/v1/completions", json=BODY)
    assert response.json() == {"length": len(response.request.content)}


@pytest.mark.parametrize(
    "body",
    [
        {"input": "Hi"},
        {"input": 'say "calibration"'},
        {"input": {"calibration": 1}},
        {"calibration": None},
        {"calibration": "none"},
        ["calibration"],
    ],
    ids=json.dumps,
)
def test_plain_bodies_pass(client, body):
    response = client.post("/v1/responses", json=body)
    assert response.json() == {"length": len(response.request.content)}


@pytest.mark.parametrize("body", [b"", b'{"calibration"', b'\xff\x00"calibration"'])
def test_what_is_no_json_is_left_to_the_route(client, body):
    assert client.post("/v1/responses", content=body).json() == {"length": len(body)}


def test_a_body_in_pieces_arrives_whole(client):
    pieces = iter([b"a" * 1000, b"b" * 500, b"c"])
    assert client.post("/v1/responses", content=pieces).json() == {"length": 1501}
