"""The OpenAPI document: vLLM's, with our field, receipt, errors and keys in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from typing import Any

from fastapi import FastAPI

from calibrators.interface import Calibrator
from server import __version__
from server.middleware.paths import PROBES
from server.refusals import FIELD
from server.routes.generate import PATHS
from server.routes.requests import CalibratedChatRequest, CalibratedCompletionRequest

Schema = dict[str, Any]
_SCHEMAS = "#/components/schemas/"
_COUNT: Schema = {"type": "integer", "minimum": 0}
_COUNTS: Schema = {
    "heads": _COUNT,
    "prompt_tokens": _COUNT,
    "completion_tokens": _COUNT,
    "statistics": {"type": "object"},
    "skipped": {"type": ["string", "null"]},
}
ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "additionalProperties": False,
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "additionalProperties": False,
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
RECEIPT: Schema = {
    "type": "object",
    "required": ["digest", "applied"],
    "properties": {
        "digest": {"type": "string", "pattern": "^[0-9a-f]{12}$"},
        "applied": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["method", "params", "profile", "layers", "heads", "prompt_tokens"],
                "properties": {
                    "method": {"type": "string"},
                    "params": {"type": "object"},
                    "profile": {"type": ["string", "null"]},
                    "layers": _COUNT,
                    **_COUNTS,
                    "choices": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "required": ["index"],
                            "properties": {"index": _COUNT, **_COUNTS},
                        },
                    },
                },
            },
        },
    },
}


def describe(app: FastAPI, calibrators: Iterable[Calibrator], free: Set[str] | None) -> None:
    """Have the application tell in `/openapi.json` what it really takes and answers.

    Args:
        app: with all its routes.
        calibrators: on offer; the field `calibration` has their parameters.
        free: paths that need no key where others do; None where none does.
    """
    app.title, app.version, app.openapi_schema = "Trimtab", __version__, None
    offer = tuple(calibrators)

    def openapi() -> Schema:
        if app.openapi_schema is None:
            document = FastAPI.openapi(app)
            _add_errors(document)
            _add_calibration(document, offer)
            if free is not None:
                _add_keys(document, free)
        return app.openapi_schema or {}

    # The way to change the document that FastAPI documents.
    app.openapi = openapi  # type: ignore[method-assign]


def _add_errors(document: Schema) -> None:
    """Every error is the envelope, but those of probes; a body that does not fit is a 400."""
    document["components"]["schemas"]["Error"] = ERROR
    content = {"application/json": {"schema": {"$ref": f"{_SCHEMAS}Error"}}}
    for path, operation in _operations(document):
        if path in PROBES:
            continue
        responses = operation["responses"]
        responses.pop("422", None)
        responses |= {"4XX": {"description": "Refused"}, "5XX": {"description": "Failed"}}
        for status, response in responses.items():
            if status[0] in "45":
                response["content"] = content


def _add_calibration(document: Schema, offer: Iterable[Calibrator]) -> None:
    """The field with all its forms, and the receipt."""
    schemas = document["components"]["schemas"]
    objects = []
    for calibrator in offer:
        name = f"Calibration.{calibrator.name}"
        schema = calibrator.Settings.model_json_schema(ref_template=f"{_SCHEMAS}{name}.{{model}}")
        inner = schema.pop("$defs", {})
        schemas |= {f"{name}.{key}": each for key, each in inner.items()}
        schemas[name] = {**schema, "required": [*schema.get("required", ()), "method"]}
        objects.append({"$ref": f"{_SCHEMAS}{name}"})
    one = {"anyOf": [{"type": "string"}, *objects]}
    several = {"type": "array", "minItems": 1, "items": one}
    schemas["Calibration"] = {"anyOf": [*one["anyOf"], several, {"type": "null"}]}
    schemas["CalibrationReceipt"] = RECEIPT
    for model in (CalibratedChatRequest, CalibratedCompletionRequest):
        field = schemas[model.__name__]["properties"][FIELD]
        del field["anyOf"]
        field["allOf"] = [{"$ref": f"{_SCHEMAS}Calibration"}]
    answer = {
        "type": "object",
        "properties": {FIELD: {"$ref": f"{_SCHEMAS}CalibrationReceipt"}},
    }
    for path in PATHS:
        document["paths"][path]["post"]["responses"]["200"]["content"] = {
            "application/json": {"schema": answer},
            "text/event-stream": {},
        }


def _add_keys(document: Schema, free: Set[str]) -> None:
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{"key": []}]
    for path, operation in _operations(document):
        if path in free:
            operation["security"] = []


def _operations(document: Schema) -> Iterator[tuple[str, Schema]]:
    for path, item in document["paths"].items():
        for operation in item.values():
            yield path, operation
