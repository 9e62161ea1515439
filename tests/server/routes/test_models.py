"""Presets as models: how they are listed, and what a request to one gets."""

import json

import pytest
from fastapi.testclient import TestClient

from server.presets import Preset

PRESETS = {
    "calm": {"method": "zerotuning", "gamma": 0.5},
    "sinks": [{"method": "act"}],
}
PATHS = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
}


@pytest.fixture
def app(make_app):
    return make_app(presets={name: Preset(name, each) for name, each in PRESETS.items()})


@pytest.fixture(params=PATHS, ids=["chat", "text"])
def post(request, client):
    def send(**fields):
        return client.post(request.param, json={**PATHS[request.param], **fields})

    return send


def test_the_list_has_the_model_under_every_preset(client):
    body = client.get("/v1/models").json()
    model, *presets = body["data"]
    assert (body["object"], model["id"], model["parent"]) == ("list", "m", None)
    assert [each["id"] for each in presets] == ["m:calm", "m:sinks"]
    for each in presets:
        assert each == model | {"id": each["id"], "parent": "m"}


def test_without_presets_the_list_is_vllms(make_app):
    body = TestClient(make_app()).get("/v1/models").json()
    assert [each["id"] for each in body["data"]] == ["m"]


@pytest.mark.parametrize("field", [{}, {"calibration": None}])
def test_the_name_of_a_preset_calibrates(post, engine, field):
    response = post(model="m:calm", **field)
    body = response.json()
    assert (response.status_code, body["model"]) == (200, "m:calm")
    assert body["calibration"]["applied"][0]["params"]["gamma"] == 0.5
    assert response.headers["X-Calibration"].startswith("zerotuning;")
    assert engine.requests[0].model == "m"
    by_field = post(model="m", calibration="calm").json()["calibration"]
    assert by_field["digest"] == body["calibration"]["digest"]


def test_a_field_wins_over_the_name(post, engine):
    body = post(model="m:calm", calibration={"method": "zerotuning", "gamma": 2}).json()
    assert body["model"] == "m:calm"
    assert body["calibration"]["applied"][0]["params"]["gamma"] == 2
    plain = post(model="m:calm", calibration="none").json()
    assert plain["model"] == "m:calm"
    assert "calibration" not in plain
    assert engine.payloads[-1] is None


@pytest.mark.parametrize("calibration", [None, "none"], ids=["calibrated", "plain"])
def test_every_chunk_of_a_stream_has_the_name(post, engine, calibration):
    def chunk(reason):
        body = {"model": "m", "choices": [{"index": 0, "finish_reason": reason}]}
        return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"

    engine.chunks = [chunk(None), chunk(None), chunk("stop")]
    lines = post(model="m:calm", calibration=calibration, stream=True).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    found = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert [each["model"] for each in found] == ["m:calm"] * 3
    assert ["calibration" in each for each in found] == [False, False, calibration is None]


def test_the_name_is_no_way_around_admission(post, engine):
    response = post(model="m:calm", calibration={"method": "zerotuning", "gamma": 0})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "calibration.gamma"
    assert engine.requests == []


@pytest.mark.parametrize("model", ["m:none", "m:", "m:zerotuning", "x:calm", ":calm", "calm"])
def test_any_other_name_is_vllms_to_judge(post, engine, model):
    assert "calibration" not in post(model=model).json()
    assert engine.requests[0].model == model


@pytest.mark.parametrize("model", ["m", None])
def test_a_plain_model_stays_plain(post, engine, model):
    assert "calibration" not in post(model=model).json()
    assert engine.payloads == [None]


def test_presets_are_listed(client):
    body = client.get("/v1/calibration/presets").json()
    assert body["object"] == "list"
    assert body["data"] == [
        {
            "id": name,
            "object": "calibration.preset",
            "description": "",
            "calibration": PRESETS[name],
            "models": [f"m:{name}"],
        }
        for name in PRESETS
    ]
