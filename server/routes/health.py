"""`GET /ready` and `GET /version`. `GET /health` is vLLM's own."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import vllm
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from server import __version__

router = APIRouter()


@router.get("/ready")
async def ready(request: Request) -> JSONResponse:
    """200 while requests are welcome; 503 while draining or when the engine is dead."""
    state = request.app.state
    if state.trimtab.gate.closed:
        return _unready("draining")
    if state.engine_client.errored:
        return _unready("dead")
    return JSONResponse({"status": "ready"})


@router.get("/version")
async def version() -> dict[str, Any]:
    """Versions of Trimtab and of vLLM."""
    return {"version": __version__, "vllm_version": vllm.__version__}


def _unready(status: str) -> JSONResponse:
    return JSONResponse({"status": status}, HTTPStatus.SERVICE_UNAVAILABLE)
