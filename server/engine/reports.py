"""Where the front end meets the engine's output."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from server.engine.payload import KEY, Report

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient
    from vllm.v1.engine import EngineCoreOutput


def listen(engine_client: EngineClient, on_report: Callable[[Report, int], None]) -> None:
    """Call `on_report(report, choice)` for every report, before its output reaches a handler.

    The hook sits where all outputs pass, because vLLM merges the outputs of `n > 1` later on and
    keeps the transfer parameters of one choice only. The report is taken out of the transfer
    parameters, so that responses show none of it.
    """
    processor = engine_client.output_processor
    process = processor.process_outputs

    def process_outputs(outputs: Sequence[EngineCoreOutput], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        for output in outputs:
            report = Report.from_transfer_params(output.kv_transfer_params)
            if report is not None:
                output.kv_transfer_params = _without(output.kv_transfer_params)
                state = processor.request_states.get(output.request_id)
                if state is not None:
                    on_report(report, state.request_index)
        return process(outputs, *args, **kwargs)

    processor.process_outputs = process_outputs


def _without(params: dict[str, Any]) -> dict[str, Any] | None:
    return {key: value for key, value in params.items() if key != KEY} or None


def on_shutdown(engine_client: EngineClient, callback: Callable[[float], None]) -> None:
    """Call `callback(seconds)` when the server begins to shut the engine down, before it drains.

    What it takes of the seconds that running requests are given is taken off them.

    vLLM drains where it stops the engine. One API server of several does not: it would hang up
    on its requests at once, so it waits for them here.
    """
    shutdown = engine_client.shutdown

    def announce(*args: Any, timeout: float | None = None, **kwargs: Any) -> Any:  # noqa: ANN401
        started = time.monotonic()
        callback(timeout or 0)
        if timeout is not None:
            timeout = max(timeout - (time.monotonic() - started), 0)
        if engine_client.engine_core.resources.engine_manager is None:
            _wait_for_requests(engine_client, timeout or 0)
        return shutdown(*args, timeout=timeout, **kwargs)

    engine_client.shutdown = announce


def _wait_for_requests(engine_client: EngineClient, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while engine_client.get_num_unfinished_requests() and time.monotonic() < deadline:
        time.sleep(0.05)
