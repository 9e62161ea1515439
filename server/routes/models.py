"""`GET /v1/models`: vLLM's list, and each model under each preset."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from server.front_end import FrontEnd

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """Names that a request's `model` may say."""
    state = request.app.state
    front_end: FrontEnd = state.trimtab
    served = await state.openai_serving_models.show_available_models()
    models: dict[str, Any] = served.model_dump()
    cards = {card["id"]: card for card in models["data"]}
    calibrated = [
        {**cards[alias.model], "id": name, "parent": alias.model}
        for name, alias in front_end.aliases.items()
    ]
    return {**models, "data": [*models["data"], *calibrated]}
