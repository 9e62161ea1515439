import pytest
from fastapi.testclient import TestClient

from server.catalogue import entry


@pytest.fixture
def with_vision(make_app, make_facts, make_calibrator):
    """A client of a server that also offers a vision method."""

    def make(modality):
        vision = make_calibrator("vision", title="Seeing", modality="vision")
        return TestClient(make_app(facts=make_facts(modality=modality), more=[vision]))

    return make


def test_the_list_describes_what_is_on_offer(app):
    body = TestClient(app).get("/v1/calibrators").json()
    assert body["object"] == "list"
    offer = app.state.trimtab.admission.calibrators
    assert [each["id"] for each in body["data"]] == list(offer)
    zero = body["data"][0]
    assert zero == {
        **entry(offer["zerotuning"], None),
        "available": True,
        "unavailable_reason": None,
        "profiles": [],
    }


@pytest.mark.parametrize(("modality", "available"), [("text", False), ("vision", True)])
def test_a_method_the_model_cannot_use_says_why(with_vision, modality, available):
    client = with_vision(modality)
    shown = client.get("/v1/calibrators/vision").json()
    assert shown == client.get("/v1/calibrators").json()["data"][-1]
    assert shown["available"] is available
    assert (shown["unavailable_reason"] is None) is available
    if not available:
        assert "Seeing needs a model that takes images" in shown["unavailable_reason"]


def test_defaults_are_those_for_the_served_model(make_app):
    shown = TestClient(make_app()).get("/v1/calibrators/act").json()
    assert shown["defaults"]["layers"] == [2, 3]
    assert (shown["available"], shown["unavailable_reason"]) == (True, None)


@pytest.mark.parametrize("name", ["unknown", "ZeroTuning", "%2e%2e", "zerotuning%00"])
def test_an_unknown_one_is_not_found(app, name):
    response = TestClient(app).get(f"/v1/calibrators/{name}")
    assert response.status_code == 404
    error = response.json()["error"]
    assert error["type"] == "not_found_error"
    assert name not in error["message"]


def test_only_reading_is_allowed(app):
    response = TestClient(app).post("/v1/calibrators", json={})
    assert (response.status_code, response.json()["error"]["code"]) == (405, "method_not_allowed")
