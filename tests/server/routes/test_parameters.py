"""Every parameter of every calibrator, with values that fit its schema and values that do not."""

from __future__ import annotations

import json
from math import isfinite

import jsonschema
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calibrators import registry
from server.admission import Admission, Refusal
from server.refusals import BASE

CALIBRATORS = dict(registry.load())
FIELDS = [(n, f) for n, c in CALIBRATORS.items() for f in c.Settings.model_fields if f not in BASE]
IDS = [f"{name}-{field}" for name, field in FIELDS]
# What else a request has to say, or may not leave at its default, for a field to be looked at.
BESIDE = {
    "zerotuning": {"gamma": 0.5},
    "act": {"layers": "all"},
    "var": {"sink_dims": [1]},
    "gift": {"alpha": 1.0, "saliency_layer": 1},
}
# Indices beyond the model, and a threshold beside alpha, fit the schema and are refused after it.
LAYERS, HEADS = 4, 6
BOUNDS = ("minimum", "maximum")
RAW = "@1e400"
HOSTILE = st.one_of(
    st.sampled_from(
        [float("nan"), float("inf"), -float("inf"), RAW, True, False, "", "all", "0.5"]
    ),
    st.sampled_from([2**63, -(2**64), 10**300, -1, 0, 1e308, -1e308, 5e-324, -0.0, 1.5]),
    st.integers() | st.floats() | st.text(max_size=5),
    st.lists(st.integers(-1, 9) | st.booleans() | st.floats(), max_size=4),
    st.just([0] * 2000) | st.just(list(range(2000))) | st.just([[[[]]]]),
    st.dictionaries(st.sampled_from(["0", "03", "x", "-1", "99", ""]), st.lists(st.integers(0, 9))),
)


def schema(name, field):
    return CALIBRATORS[name].Settings.model_json_schema()["properties"][field]


def values(schema):
    """Values that fit a schema and that the small model has layers, heads and channels for."""
    if "anyOf" in schema:
        return st.one_of(*map(values, schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum", [schema.get("const")]))
    kind = schema["type"]
    if kind == "number":
        low, high = (schema.get(k, schema.get(f"exclusive{k.title()}")) for k in BOUNDS)
        open_low, open_high = (f"exclusive{k.title()}" in schema for k in BOUNDS)
        return st.floats(
            low, 1e6 if high is None else high, exclude_min=open_low, exclude_max=open_high
        )
    if kind == "array":
        return st.lists(st.integers(0, LAYERS - 1), min_size=1, unique=True)
    if kind == "object":
        keys = st.integers(0, LAYERS - 1).map(str)
        return st.dictionaries(keys, values(schema["additionalProperties"]), min_size=1)
    return {"integer": st.integers(0, LAYERS - 1), "null": st.none()}[kind]


@pytest.fixture(scope="module")
def facts(make_facts):
    return make_facts(modality="vision", layers=LAYERS, query_heads=HEADS)


@pytest.fixture
def post(make_app, facts, engine):
    """Send a calibration; JSON of Python's own kind, so that what is not finite arrives."""
    client = TestClient(make_app(facts), raise_server_exceptions=False)

    def send(calibration):
        body = json.dumps({"model": "m", "prompt": "hi", "calibration": calibration})
        content = body.replace(f'"{RAW}"', RAW[1:])
        headers = {"Content-Type": "application/json"}
        return client.post("/v1/completions", content=content, headers=headers)

    return send


def fits(name, field, value):
    if value == RAW or (isinstance(value, float) and not isfinite(value)):
        return False
    return jsonschema.Draft202012Validator(schema(name, field)).is_valid(value)


@pytest.mark.parametrize(("name", "field"), FIELDS, ids=IDS)
def test_what_fits_is_admitted(facts, name, field):
    admission = Admission(CALIBRATORS, facts, "model")

    @settings(max_examples=40)
    @given(value=values(schema(name, field)).filter(lambda value: value is not None))
    def check(value):
        request = {"method": name, **BESIDE.get(name, {}), field: value}
        admitted = admission.admit(request)
        assert admitted.methods == (name,)
        assert isinstance(admitted.bounds[0].params, dict)

    check()


@pytest.mark.parametrize(("name", "field"), FIELDS, ids=IDS)
def test_what_does_not_is_refused_by_name(post, engine, name, field):
    @settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(value=HOSTILE)
    def check(value):
        response = post({"method": name, **BESIDE.get(name, {}), field: value})
        assert response.status_code in (200, 400), response.text
        if not fits(name, field, value):
            error = response.json()["error"]
            assert response.status_code == 400
            assert error["param"] == f"calibration.{field}"
            assert error["code"] == "invalid_calibration"
            assert len(response.content) <= 4096

    check()


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    calibration=st.recursive(
        st.none() | st.booleans() | st.floats() | st.sampled_from([*CALIBRATORS, "none", ""]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["method", "alpha", "layers", "x"]), inner)
        ),
    )
)
def test_no_calibration_breaks_admission(facts, calibration):
    try:
        Admission(CALIBRATORS, facts, "model").admit(calibration)
    except Refusal as refusal:
        assert refusal.param.startswith("calibration")
        assert refusal.message
