"""Reports on outputs that are complete only later, when the next step may already run."""

from __future__ import annotations

from typing import Any

from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from server.engine.progress import Reports

ATTRIBUTE = "calibration_reports"


class Arriving(AsyncModelRunnerOutput):
    """An output of vLLM's that carries reports once it is there."""

    def __init__(self, output: AsyncModelRunnerOutput, reports: Reports) -> None:
        self._output, self._reports = output, reports

    def get_output(self) -> ModelRunnerOutput:
        """Wait for the output."""
        output = self._output.get_output()
        setattr(output, ATTRIBUTE, self._reports)
        return output


def with_reports(output: Any, reports: Reports) -> Any:  # noqa: ANN401 - what a worker returns
    """The output with reports on it; None where it cannot carry any yet."""
    if isinstance(output, AsyncModelRunnerOutput):
        return Arriving(output, reports)
    if isinstance(output, ModelRunnerOutput):
        setattr(output, ATTRIBUTE, reports)
        return output
    return None
