import pytest
from fastapi.testclient import TestClient

from calibrators import registry

STRENGTHS = {"1": {"0": 0.5, "5": 2.0}, "3": {"2": 0.25}}


@pytest.fixture
def profiles(make_profile):
    """Two profiles of one method."""
    found = (
        make_profile(),
        make_profile(name="heads", parameters={}, strengths=STRENGTHS),
    )
    return {profile.name: profile for profile in found}


@pytest.fixture
def app(make_app, profiles):
    return make_app(profiles=profiles)


def test_profiles_are_listed(client, profile_content):
    body = client.get("/v1/calibration/profiles").json()
    content = profile_content()
    assert (body["object"], [each["id"] for each in body["data"]]) == ("list", ["calm", "heads"])
    assert body["model"] == content["model"]
    shown = {name: content[name] for name in ("method", "model", "parameters", "provenance")}
    calm, heads = body["data"]
    assert calm == {"id": "calm", "object": "calibration.profile", "strengths": None, **shown}
    assert heads["strengths"] == STRENGTHS


def test_without_profiles_the_list_is_empty(make_app):
    assert TestClient(make_app()).get("/v1/calibration/profiles").json()["data"] == []


def test_a_method_lists_its_profiles(client):
    listed = {each["id"]: each["profiles"] for each in client.get("/v1/calibrators").json()["data"]}
    assert listed == {name: [] for name in registry.BUILT_IN} | {"zerotuning": ["calm", "heads"]}
    schema = client.get("/v1/calibrators/zerotuning").json()["params_schema"]
    assert "supplies the parameters" in schema["properties"]["profile"]["description"]


def test_the_receipt_names_the_profile(client, engine):
    body = {"prompt": "hi", "calibration": {"method": "zerotuning", "profile": "heads"}}
    (applied,) = client.post("/v1/completions", json=body).json()["calibration"]["applied"]
    assert (applied["profile"], applied["layers"], applied["heads"]) == ("heads", 2, 3)
    assert applied["params"] == {
        "gamma": STRENGTHS,
        "layers": [1, 3],
        "heads": {"1": [0, 5], "3": [2]},
    }
    assert engine.payloads[0].calibrations[0].params == applied["params"]


def test_an_unknown_profile_is_a_400(client, app, engine):
    body = {"prompt": "hi", "calibration": {"method": "act", "profile": "calm"}}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == ("calibration.profile", "invalid_calibration")
    samples = app.state.samples
    labels = {"reason": "unknown_profile"}
    assert samples.get_sample_value("trimtab_rejections_total", labels) == 1
    assert engine.requests == []
