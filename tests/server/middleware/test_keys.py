"""Who is let in, and as whom."""

from __future__ import annotations

import ast
import asyncio
import hashlib
import hmac
import inspect

import pytest

from server.middleware import keys
from server.middleware.keys import KeyMiddleware

KEYS = ("first-key", "zweiter-schlüssel", "third")


@pytest.fixture
def client(make_client):
    return make_client(KeyMiddleware, keys=KEYS, open_paths=frozenset({"/open"}))


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens_and_tells_the_tenant(client, key):
    for scheme in ("Bearer", "bearer", "BEARER "):
        response = client.get("/x", headers={"Authorization": f"{scheme} {key}".encode()})
        answer = response.json()
        assert answer["tenant"] == answer["current"] == hashlib.sha256(key.encode()).hexdigest()


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer ",
        "first-key",
        "Basic first-key",
        "Bearer first-key2",
        "Bearer first-ke",
        "Bearer first-key third",
        "Bearer First-Key",
        "Bearer\tfirst-key",
        b"Bearer \xff\xfe",
        "Bearer " + hashlib.sha256(b"first-key").hexdigest(),
    ],
)
def test_anything_else_does_not(client, header):
    response = client.get("/x", headers={"Authorization": header})
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert "first-key" not in response.text


def test_no_header_and_two_headers_are_no_key(client):
    assert client.get("/x").status_code == 401
    header = ("Authorization", "Bearer first-key")
    assert client.get("/x", headers=[header, header]).status_code == 401


def test_an_open_path_is_open_to_all_and_names_no_tenant(client):
    response = client.get("/open", headers={"Authorization": "Bearer wrong"})
    answer = response.json()
    assert (response.status_code, answer["tenant"], answer["current"]) == (200, None, None)


@pytest.mark.parametrize("path", ["/open/", "/open/x", "//open", "/Open", "/opener", "/%6fpen/x"])
def test_what_is_open_is_no_prefix(client, path):
    assert client.get(path).status_code == 401


def test_all_keys_are_compared_whichever_it_is(client, monkeypatch):
    compared = []

    def compare(one, other):
        compared.append(other)
        return hmac_compare(one, other)

    hmac_compare = hmac.compare_digest
    monkeypatch.setattr(keys.hmac, "compare_digest", compare)
    client.get("/x", headers={"Authorization": "Bearer first-key"})
    client.get("/x", headers={"Authorization": "Bearer wrong"})
    assert len(compared) == 2 * len(KEYS)


def test_digests_are_compared_in_no_other_way():
    tree = ast.parse(inspect.getsource(KeyMiddleware))
    compared = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Compare)]
    assert not [text for text in compared if "digest" in text and text != "digest is not None"]


@pytest.mark.parametrize("given", [(), ("",), ("a", "")])
def test_a_lock_without_a_key_is_a_mistake(given):
    with pytest.raises(ValueError, match="has to be a key"):
        KeyMiddleware(lambda: None, given, frozenset())


def test_a_websocket_is_closed_where_a_request_is_told_to_bring_a_key():
    async def never(scope, receive, send):
        raise AssertionError("let in")

    sent = []

    async def send(message):
        sent.append(message)

    middleware = KeyMiddleware(never, KEYS, frozenset({"/open"}))
    for path in ("/x", "/open"):
        scope = {"type": "websocket", "path": path, "headers": [(b"authorization", b"Bearer x")]}
        asyncio.run(middleware(scope, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}] * 2


def test_a_websocket_with_a_key_is_let_in_as_the_tenant():
    seen = []

    async def app(scope, receive, send):
        seen.append(scope)

    middleware = KeyMiddleware(app, KEYS, frozenset())
    scope = {"type": "websocket", "path": "/", "headers": [(b"authorization", b"Bearer third")]}
    asyncio.run(middleware(scope, None, None))
    assert seen[0][keys.TENANT] == hashlib.sha256(b"third").hexdigest()


def test_the_refusal_says_how_to_bring_a_key(client):
    error = client.get("/x").json()["error"]
    assert error["message"] == "this server needs a valid API key: Authorization: Bearer KEY"
