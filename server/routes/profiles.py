"""`GET /v1/calibration/profiles`: what requests may name in `profile`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from calibrators.profiles import ModelIdentity, Profile
from server.front_end import FrontEnd

router = APIRouter()


@router.get("/v1/calibration/profiles")
async def list_profiles(request: Request) -> dict[str, Any]:
    """All profiles that were loaded, and the model that a profile has to be for."""
    front_end: FrontEnd = request.app.state.trimtab
    admission = front_end.admission
    return {
        "object": "list",
        "data": [_described(profile) for profile in admission.profiles.values()],
        "model": {name: getattr(admission.facts, name) for name in ModelIdentity.model_fields},
    }


def _described(profile: Profile) -> dict[str, Any]:
    content = profile.model_dump(mode="json", exclude={"format", "name"})
    return {"id": profile.name, "object": "calibration.profile", **content}
