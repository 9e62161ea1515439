"""Model names that stand for a preset, for clients that cannot send the field `calibration`."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi.responses import JSONResponse, StreamingResponse
from starlette.responses import Response

from server.errors import replaced
from server.presets import PresetError

# The field as vLLM writes it. Inside a string its quotes would be escaped, so the first match is
# the field itself, whatever a model says.
_MODEL = re.compile(r'"model":"(?:[^"\\]|\\.)*"')


@dataclass(frozen=True, slots=True)
class Alias:
    """A served model under a preset.

    Attributes:
        model: name the model is served under.
        preset: name of the preset.
    """

    model: str
    preset: str


def aliases(models: Sequence[str], presets: Iterable[str]) -> dict[str, Alias]:
    """Aliases by name: `<served model>:<preset>` for each of both.

    Raises:
        PresetError: a model is served under such a name itself.
    """
    found = {f"{model}:{preset}": Alias(model, preset) for preset in presets for model in models}
    for taken in models:
        if taken in found:
            raise PresetError(found[taken].preset, f"a model is served as {taken}: rename one")
    return found


def answered_as(response: Response | None, name: str) -> Response | None:
    """An answer that says it comes from the model `name`; errors stay as they are."""
    if isinstance(response, StreamingResponse):
        response.body_iterator = _renamed(response.body_iterator, name)
    elif isinstance(response, JSONResponse) and response.status_code == HTTPStatus.OK:
        content = json.loads(bytes(response.body))
        return replaced(response, content | {"model": name}, HTTPStatus.OK)
    return response


async def _renamed(chunks: AsyncIterable[Any], name: str) -> AsyncIterator[Any]:
    field = f'"model":{json.dumps(name)}'
    async for chunk in chunks:
        yield _MODEL.sub(lambda _: field, chunk, count=1)
