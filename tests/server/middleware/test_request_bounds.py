"""Bodies looked at before any route does."""

from __future__ import annotations

import json
from http import HTTPStatus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import ApiError
from server.middleware.request_bounds import RequestBoundsMiddleware, parse


def refuse_secrets(body):
    if "secret" in body:
        raise ApiError(HTTPStatus.BAD_REQUEST, "no secrets", param="secret", code="secret")


@pytest.fixture
def client(make_client):
    return make_client(RequestBoundsMiddleware, checks=(refuse_secrets,))


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_a_check_refuses_for_every_method(client, method):
    response = client.request(method, "/x", json={"secret": 1})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "secret"


@pytest.mark.parametrize("kind", ["application/json", "text/plain", "", "multipart/form-data"])
def test_whatever_the_body_says_it_is(client, kind):
    response = client.post("/x", content=b'{"secret": 1}', headers={"Content-Type": kind})
    assert response.status_code == 400


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_however_it_is_encoded(client, encoding):
    for text in ('{"secret": 1}', '{"s\\u0065cret": 1}'):
        assert client.post("/x", content=text.encode(encoding)).status_code == 400


@pytest.mark.parametrize(
    "body",
    [
        b'{"temperature": NaN}',
        b'{"a": [{"b": Infinity}]}',
        b'{"a": -Infinity}',
        b'{"a": 1e400}',
        b'{"a": -1e999}',
        b"[1e400]",
        b"NaN",
        b'{"a": ' + b"1" * 5000 + b"}",
        b"[" * 200_000,
        b'{"a":' * 200_000,
    ],
    ids=lambda body: body[:12],
)
def test_numbers_that_are_not_finite_and_endless_nesting_are_refused(client, body):
    response = client.post("/x", content=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "invalid_request"
    assert len(response.content) < 300


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"temperature": NaN}', "temperature"),
        (b'{"a": [0.5, {"b": -Infinity}]}', "a[1].b"),
        (b"[[1e400]]", "[0][0]"),
        (b"NaN", None),
        (b'{"a": {"calibration": NaN}}', "a.calibration"),
        (b'{"": {"calibration": NaN}}', ".calibration"),
    ],
)
def test_the_field_is_named(client, body, param):
    error = client.post("/x", content=body).json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(param or "the body")


@pytest.mark.parametrize("body", [b'{"calibration": {"gamma": NaN}}', b'{"a": NaN, "a": 1}'])
def test_what_others_refuse_or_nobody_sees_is_left_alone(client, body):
    assert client.post("/x", content=body).json()["length"] == len(body)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff\xfe\x00", b'{"a": 1} {"secret": 1}', b'"secret"', b'["secret"]']
)
def test_what_is_no_object_is_left_to_the_route(client, body):
    assert client.post("/x", content=body).json()["length"] == len(body)


def test_a_body_arrives_untouched(client):
    body = b' {"a" :  1.50, "a": "NaN", "b":1e300}\n'
    assert client.post("/x", content=body).json()["length"] == len(body)
    pieces = iter([b'{"a":', b" 1", b"}"])
    assert client.post("/x", content=pieces).json()["length"] == 8


def test_methods_without_a_body_are_not_read(client):
    assert client.request("GET", "/x", content=b'{"secret": 1}').json()["length"] == 13


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@given(value=JSON)
def test_a_value_is_read_as_it_is_or_refused_for_its_numbers(value):
    text = json.dumps(value)
    finite = not any(word in json.dumps(value, ensure_ascii=True) for word in ("NaN", "Infinity"))
    try:
        assert parse(text.encode()) == value
    except ApiError as error:
        assert not finite
        assert "no finite number" in error.message


@given(sent=st.binary(max_size=60))
def test_no_bytes_break_it(sent):
    try:
        parse(sent)
    except ApiError as error:
        assert error.status == 400
