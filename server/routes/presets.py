"""`GET /v1/calibration/presets`: calibrations that the operator has named."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from server.front_end import FrontEnd
from server.presets import Preset

router = APIRouter()


@router.get("/v1/calibration/presets")
async def list_presets(request: Request) -> dict[str, Any]:
    """All presets, and the model names that stand for them."""
    front_end: FrontEnd = request.app.state.trimtab
    presets = front_end.admission.presets.values()
    return {"object": "list", "data": [_described(preset, front_end) for preset in presets]}


def _described(preset: Preset, front_end: FrontEnd) -> dict[str, Any]:
    return {
        "id": preset.name,
        "object": "calibration.preset",
        "description": preset.description,
        "calibration": preset.calibration,
        "models": [n for n, alias in front_end.aliases.items() if alias.preset == preset.name],
    }
