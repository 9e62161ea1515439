"""Steps with calibrated requests stay out of full CUDA graphs, whichever model runner there is.

A full graph replays the launches of a step that had no plan. vLLM's graphs of pieces end before
each attention layer, which then runs as Python; plain steps keep their full graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import replace
from typing import Any

from vllm.config import CUDAGraphMode

# More requests than any full graph was captured for.
MANY = 1 << 30


def keep_out(runner: Any, calibrated: Callable[[], bool]) -> None:  # noqa: ANN401 - of either kind
    """Have a model runner's dispatcher ask whether a step is calibrated."""
    manager = getattr(runner, "cudagraph_manager", None)
    if manager is not None:
        manager.dispatch = PlainBatchesOnly(manager.dispatch, calibrated)
    else:
        dispatcher = runner.cudagraph_dispatcher
        dispatcher.dispatch = PlainStepsOnly(dispatcher.dispatch, calibrated)


class PlainStepsOnly:
    """A `dispatch` that offers no full graph while a calibrated step runs; of the V1 runner.

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


class PlainBatchesOnly:
    """A `dispatch` that offers no full graph while a calibrated step runs; of the V2 runner.

    It cannot be told which graphs to leave out. But a full graph is for so many requests at most,
    and one of pieces for any number.

    Args:
        dispatch: that of vLLM's `CudaGraphManager`.
        calibrated: whether any request of the step is.
    """

    def __init__(self, dispatch: Callable[..., Any], calibrated: Callable[[], bool]) -> None:
        self._dispatch = dispatch
        self._calibrated = calibrated

    def __call__(
        self,
        num_reqs: int,
        *args: Any,  # noqa: ANN401 - vLLM's
        **options: Any,  # noqa: ANN401 - vLLM's
    ) -> Any:  # noqa: ANN401 - vLLM's
        """Which graph to replay."""
        if not self._calibrated():
            return self._dispatch(num_reqs, *args, **options)
        found: Any = self._dispatch(MANY, *args, **options)
        return found if found.num_reqs is None else replace(found, num_reqs=num_reqs)
