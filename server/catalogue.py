"""Descriptions of calibrators, for people and programs, from their declarations."""

from __future__ import annotations

from typing import Any

from calibrators.interface import Bound, Calibrator
from server.refusals import BASE


def entry(calibrator: Calibrator, usual: Bound | None) -> dict[str, Any]:
    """A calibrator as `GET /v1/calibrators` shows it, without whether it is available.

    Args:
        calibrator: to describe.
        usual: what a request without parameters would get, None where it would be refused.
    """
    resolved = {} if usual is None else dict(usual.params)
    return {
        "id": calibrator.name,
        "object": "calibrator",
        "title": calibrator.title,
        "paper": calibrator.paper,
        "modality": calibrator.modality,
        "causal": calibrator.causal,
        "params_schema": calibrator.Settings.model_json_schema(),
        "defaults": defaults(calibrator) | resolved,
    }


def defaults(calibrator: Calibrator) -> dict[str, Any]:
    """Default of every parameter that has one."""
    fields = calibrator.Settings.model_fields
    return {
        name: field.get_default(call_default_factory=True)
        for name, field in fields.items()
        if name not in BASE and not field.is_required()
    }


def table(calibrators: list[Calibrator]) -> str:
    """Calibrators, parameters, defaults and papers as plain text."""
    return "\n\n".join(_paragraph(calibrator) for calibrator in calibrators)


def _paragraph(calibrator: Calibrator) -> str:
    lines = [
        f"{calibrator.name}  {calibrator.title}, {calibrator.modality}",
        f"  paper: {calibrator.paper}",
    ]
    usual = defaults(calibrator)
    own = {n: f for n, f in calibrator.Settings.model_fields.items() if n not in BASE}
    width = max(map(len, own), default=0)
    for name, field in own.items():
        default = usual.get(name)
        shown = (
            "required" if field.is_required() else "" if default is None else f"default {default}"
        )
        description = " ".join((field.description or "").split())
        lines.append(f"  {name:<{width}}  {shown:<14} {description}")
    return "\n".join(lines)
