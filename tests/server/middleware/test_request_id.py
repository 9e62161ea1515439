"""The id of a request, in both directions."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from server.middleware.request_id import HEADER, SCOPE, RequestIdMiddleware

MADE_UP = re.compile(r"[0-9a-f]{32}")


def seen(response):
    return [v for n, v in response.json()["headers"] if n == HEADER.lower()]


@pytest.mark.parametrize("given_id", ["a", "0f8.A_b-9", "x" * 128])
def test_a_sane_id_goes_through_and_comes_back(make_client, given_id):
    response = make_client(RequestIdMiddleware).get("/x", headers={HEADER: given_id})
    assert response.headers.get_list(HEADER) == [given_id]
    assert seen(response) == [given_id]


@pytest.mark.parametrize(
    "given_id", ["", "x" * 129, "a b", "a/b", "ä".encode(), "a\tb", "<script>", "a,b", "a%0d"]
)
def test_an_id_that_is_not_sane_is_replaced(make_client, given_id):
    response = make_client(RequestIdMiddleware).get("/x", headers={HEADER: given_id})
    (identity,) = response.headers.get_list(HEADER)
    assert MADE_UP.fullmatch(identity)
    # vLLM would rather have it than the id of a body.
    assert seen(response) == []


def test_two_ids_are_none(make_client):
    headers = [(HEADER, "one"), (HEADER, "two")]
    response = make_client(RequestIdMiddleware).get("/x", headers=headers)
    assert MADE_UP.fullmatch(response.headers[HEADER])


def test_each_request_gets_its_own(make_client):
    client = make_client(RequestIdMiddleware)
    ids = {client.get("/x").headers[HEADER] for _ in range(20)}
    assert len(ids) == 20


def test_errors_carry_it_too(make_client):
    async def fail(request):
        raise RuntimeError("broken")

    client = make_client(RequestIdMiddleware, more=[Route("/fail", fail)])
    response = client.get("/fail", headers={HEADER: "mine"})
    assert (response.status_code, response.headers[HEADER]) == (500, "mine")
    missing = client.delete("/x", headers={HEADER: "mine"})
    assert (missing.status_code, missing.headers[HEADER]) == (405, "mine")


def test_an_id_of_the_application_gives_way(make_client):
    inner = make_client(RequestIdMiddleware).app
    client = make_client(lambda app: RequestIdMiddleware(inner))
    assert client.get("/x", headers={HEADER: "mine"}).headers.get_list(HEADER) == ["mine"]


@given(value=st.text(st.characters(max_codepoint=255), max_size=140))
def test_what_comes_back_is_always_sane(value):
    identity = run(value.encode("latin-1"))
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", identity)


def run(value):
    """The id that a header of these bytes ends up with."""
    found = []

    async def app(scope, receive, send):
        found.append(scope[SCOPE])
        headers = [v for n, v in scope["headers"] if n == b"x-request-id"]
        assert headers == ([found[0].value.encode()] if found[0].given else [])

    scope = {"type": "http", "headers": [(b"x-request-id", value)]}
    coroutine = RequestIdMiddleware(app)(scope, None, None)
    with pytest.raises(StopIteration):
        coroutine.send(None)
    (identity,) = found
    return identity.value


def test_a_route_may_set_it(make_client):
    async def own(request):
        request.scope[SCOPE].value = "mine"
        return PlainTextResponse("", headers={HEADER: "other"})

    client = make_client(RequestIdMiddleware, more=[Route("/own", own)])
    assert client.get("/own").headers.get_list(HEADER) == ["mine"]
