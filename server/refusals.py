"""Refusals of calibrations: their reasons, and what they say."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence

from pydantic_core import ErrorDetails

from calibrators.interface import Calibrator
from calibrators.settings import CalibrationSettings

# Name of the request's field.
FIELD = "calibration"
# Parameters that every method has.
BASE = frozenset(CalibrationSettings.model_fields)
# What a client's word may take up in an error message, and a list of names.
_QUOTE = 80
_LIST = 300
# Lists nested deeper than the stack and objects of a million keys are quoted in part.
_SHORTENED = reprlib.Repr()
_SHORTENED.maxlevel = 3
_SHORTENED.maxstring = _SHORTENED.maxlong = _SHORTENED.maxother = _QUOTE
# Errors that say no more than that another form of the field was meant.
_OTHER_FORM = frozenset({"literal_error", "list_type", "dict_type"})


class Refusal(Exception):
    """A calibration that is refused.

    Args:
        reason: label of the rejection metric, from `REASONS`.
        param: path of the offending field, `calibration` included.
        message: the rule, the value and what is allowed.
        method: the calibrator concerned, where it is known.
    """

    def __init__(self, reason: str, param: str, message: str, method: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.param = param
        self.message = message
        self.method = method


REASONS = (
    "malformed",
    "unknown_method",
    "unknown_profile",
    "invalid_parameter",
    "unsupported_model",
    "combination",
    "unsupported_feature",
    "no_image",
)


def invalid(errors: Sequence[ErrorDetails], path: str, calibrator: Calibrator) -> Refusal:
    """Settings of a calibrator do not have the form they should."""
    error = _most_telling(errors)
    location = errors[0]["loc"]
    param = f"{path}.{quoted(location[0], quotes=False)}" if location else path
    fields = calibrator.Settings.model_fields
    if error["type"] == "extra_forbidden":
        # What all methods have comes last.
        known = ", ".join([*(name for name in fields if name not in BASE), "profile"])
        message = f"{calibrator.name} has no parameter {quoted(location[0])}; it has {known}"
    else:
        field = fields.get(str(location[0])) if location else None
        allowed = " ".join((field.description or "").split()) if field else ""
        value = errors[0]["input"]
        message = f"{param} is {quoted(value)}, which is not allowed: {error['msg']}. {allowed}"
    return Refusal("invalid_parameter", param, message.rstrip(), calibrator.name)


def _most_telling(errors: Sequence[ErrorDetails]) -> ErrorDetails:
    """Of the errors on the first field, one per form it may take, that of the form meant."""
    field = errors[0]["loc"][:1]
    return max(
        (error for error in errors if error["loc"][:1] == field),
        key=lambda error: (len(error["loc"]), error["type"] not in _OTHER_FORM),
    )


def quoted(value: object, *, quotes: bool = True) -> str:
    """A client's word, shortened."""
    text = _SHORTENED.repr(value) if quotes else str(value)
    return text if len(text) <= _QUOTE else text[:_QUOTE] + "..."


def kind(value: object) -> str:
    """What a value is that is no calibration."""
    names = {bool: "a boolean", int: "a number", float: "a number", list: "a list"}
    return names.get(type(value), "not a calibration")


def listed(names: Iterable[str]) -> str:
    """Names in order, as many as a message has room for."""
    ordered = sorted(names)
    shown: list[str] = []
    for name in ordered:
        if sum(len(each) + 2 for each in shown) + len(name) > _LIST:
            return f"{', '.join(shown)} and {len(ordered) - len(shown)} more"
        shown.append(name)
    return ", ".join(shown) or "none"
