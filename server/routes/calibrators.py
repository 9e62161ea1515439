"""`GET /v1/calibrators`: what this server offers."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Request

from calibrators.interface import Calibrator
from server.admission import Admission
from server.catalogue import entry
from server.errors import ApiError

router = APIRouter()


@router.get("/v1/calibrators")
async def list_calibrators(request: Request) -> dict[str, Any]:
    """All calibrators on offer."""
    admission: Admission = request.app.state.trimtab.admission
    calibrators = admission.calibrators.values()
    return {"object": "list", "data": [_described(c, admission) for c in calibrators]}


@router.get("/v1/calibrators/{name}")
async def show_calibrator(name: str, request: Request) -> dict[str, Any]:
    """One calibrator."""
    admission: Admission = request.app.state.trimtab.admission
    calibrator = admission.calibrators.get(name)
    if calibrator is None:
        raise ApiError(
            HTTPStatus.NOT_FOUND,
            "there is no such calibrator; GET /v1/calibrators lists them",
            code="calibrator_not_found",
        )
    return _described(calibrator, admission)


def _described(calibrator: Calibrator, admission: Admission) -> dict[str, Any]:
    reason = admission.unavailable(calibrator)
    return {
        **entry(calibrator, admission.usual(calibrator)),
        "available": reason is None,
        "unavailable_reason": reason,
        "profiles": admission.profiles_of(calibrator),
    }
