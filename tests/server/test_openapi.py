"""What the OpenAPI document says is what the server takes and answers."""

from __future__ import annotations

import jsonschema
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from calibrators import registry
from server import __version__
from server.app import ROUTES
from server.middleware.paths import PROBES
from server.openapi import ERROR, describe
from server.routes.generate import PATHS


@pytest.fixture(scope="module")
def make_document():
    def make(free=None):
        app = FastAPI()
        for module in ROUTES:
            app.include_router(module.router)
        describe(app, registry.load().values(), free)
        return TestClient(app).get("/openapi.json").json()

    return make


@pytest.fixture(scope="module")
def document(make_document):
    return make_document()


@pytest.fixture
def fits(document):
    def check(value, name):
        schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
        return jsonschema.Draft202012Validator(schema).is_valid(value)

    return check


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("none", True),
        (None, True),
        ({"method": "zerotuning", "gamma": 0.5, "layers": [1]}, True),
        ([{"method": "var"}, {"method": "vhr", "alpha": 1.5}], True),
        ({"gamma": 0.5}, False),
        ({"method": "zerotuning", "gamma": 0}, False),
        ({"method": "zerotuning", "gama": 0.5}, False),
        ([], False),
        (5, False),
    ],
)
def test_the_field_has_every_form_and_no_other(fits, value, wanted):
    assert fits(value, "Calibration") is wanted


def test_the_document_is_of_this_server(document):
    assert (document["info"]["title"], document["info"]["version"]) == ("Trimtab", __version__)
    assert "security" not in document


def test_every_error_but_those_of_probes_is_the_envelope(document):
    assert document["components"]["schemas"]["Error"] == ERROR
    for path, item in document["paths"].items():
        for operation in item.values():
            responses = operation["responses"]
            assert "422" not in responses or path in PROBES
            errors = {status for status in responses if status[0] in "45"}
            assert errors == (set() if path in PROBES else {"4XX", "5XX"}), path


def test_answers_have_the_receipt(document, fits):
    receipt = {"digest": "4be1c0a9d2f7", "applied": []}
    assert not fits(receipt, "CalibrationReceipt")
    entry = {"method": "x", "params": {}, "profile": None, "layers": 1, "heads": 9}
    assert fits({**receipt, "applied": [{**entry, "prompt_tokens": 2}]}, "CalibrationReceipt")
    for path in PATHS:
        content = document["paths"][path]["post"]["responses"]["200"]["content"]
        assert "calibration" in content["application/json"]["schema"]["properties"]
        assert "text/event-stream" in content


def test_keys_are_asked_for_where_they_are_needed(make_document):
    document = make_document(free=frozenset({"/version"}))
    assert document["security"] == [{"key": []}]
    assert document["paths"]["/version"]["get"]["security"] == []
    assert "security" not in document["paths"]["/v1/models"]["get"]
