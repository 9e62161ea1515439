"""Where the front end meets the engine's output."""

from __future__ import annotations

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
