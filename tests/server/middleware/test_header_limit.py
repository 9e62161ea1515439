"""Headers that are too long or too many."""

from __future__ import annotations

import pytest

from server.middleware.header_limit import HeaderLimitMiddleware


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/x", {"X-Long": "a" * 1000}),
        ("/x", {"a" * 1000: "x"}),
        ("/x", {f"x-{i}": "y" for i in range(30)}),
        ("/" + "a" * 1000, {}),
        ("/x?" + "a" * 1000, {}),
    ],
    ids=["value", "name", "number", "path", "query"],
)
def test_what_is_too_much_is_refused(make_client, path, headers):
    response = make_client(HeaderLimitMiddleware, 900, 20).get(path, headers=headers)
    assert response.status_code == 431
    error = response.json()["error"]
    assert error["code"] == "headers_too_large"
    assert "20 headers and 900 bytes" in error["message"]


def test_usual_headers_pass(make_client):
    response = make_client(HeaderLimitMiddleware, 900, 20).get("/x", headers={"X-Short": "y"})
    assert response.status_code == 200


@pytest.mark.parametrize("limits", [(0, 1), (1, 0)])
def test_limits_have_to_be_positive(limits):
    with pytest.raises(ValueError, match="positive"):
        HeaderLimitMiddleware(lambda: None, *limits)
