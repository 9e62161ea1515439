"""Steps with calibrated requests stay out of full CUDA graphs.

A full graph replays the launches of a step that had no plan. vLLM's graphs of pieces end before
each attention layer, which then runs as Python; plain steps keep their full graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

from vllm.config import CUDAGraphMode


class PlainStepsOnly:
    """A graph dispatcher's `dispatch` that offers no full graph while a calibrated step runs.

    Args:
        dispatch: that of vLLM's `CudagraphDispatcher`.
        calibrated: whether any request of the step is.
    """

    def __init__(self, dispatch: Callable[..., Any], calibrated: Callable[[], bool]) -> None:
        self._dispatch = dispatch
        self._calibrated = calibrated

    def __call__(
        self,
        *args: Any,  # noqa: ANN401 - vLLM's
        invalid_modes: Set[CUDAGraphMode] | None = None,
        **options: Any,  # noqa: ANN401 - vLLM's
    ) -> Any:  # noqa: ANN401 - vLLM's
        """Which graph to replay."""
        if self._calibrated():
            invalid_modes = {CUDAGraphMode.FULL, *(invalid_modes or ())}
        return self._dispatch(*args, invalid_modes=invalid_modes, **options)
