"""Request models: vLLM's, plus the `calibration` field."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, Field, PrivateAttr
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.sampling_params import SamplingParams

DESCRIPTION = (
    "Calibration of this request: the name of a calibrator or a preset, an object with a "
    "calibrator's parameters, a list of such objects, or \"none\". Absent or null: the server's "
    "default. GET /v1/calibrators lists calibrators and their parameters."
)

CalibrationField = Annotated[
    Any,
    Field(
        description=DESCRIPTION,
        json_schema_extra={
            "anyOf": [
                {"type": "string"},
                {"type": "object", "required": ["method"]},
                {"type": "array", "minItems": 1},
                {"type": "null"},
            ]
        },
    ),
]


class Calibrated(BaseModel):
    """The field, and the hook that sends what was admitted along to the engine."""

    calibration: CalibrationField = None
    _issue: Callable[[], dict[str, Any]] | None = PrivateAttr(None)

    def calibrate_with(self, issue: Callable[[], dict[str, Any]]) -> None:
        """Add what `issue` returns to the extra arguments of each prompt's sampling."""
        self._issue = issue

    def to_sampling_params(self, *args: Any, **kwargs: Any) -> SamplingParams:  # noqa: ANN401
        """Sampling parameters as vLLM makes them, plus the payload. Called once per prompt."""
        params: SamplingParams = super().to_sampling_params(*args, **kwargs)  # type: ignore[misc]
        if self._issue is not None:
            params.extra_args = {**(params.extra_args or {}), **self._issue()}
        return params


class CalibratedChatRequest(Calibrated, ChatCompletionRequest):
    """Body of `POST /v1/chat/completions`."""


class CalibratedCompletionRequest(Calibrated, CompletionRequest):
    """Body of `POST /v1/completions`."""
