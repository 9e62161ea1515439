"""Reports on outputs that are complete only later, when the next step may already run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from server.engine.payload import KEY, Report

ATTRIBUTE = "calibration_reports"

Reports = Mapping[str, Report]
"""By request id."""


class Arriving(AsyncModelRunnerOutput):
    """An output of vLLM's that carries reports once it is there.

    Tallies go on with the next step; what is carried is as of the step of the output. Otherwise a
    request that ends here would have a step counted that came too late to stop.
    """

    def __init__(self, output: AsyncModelRunnerOutput, reports: Reports) -> None:
        self._output = output
        self._reports = {name: _settled(report) for name, report in reports.items()}

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


def _settled(report: Report) -> Report | None:
    return Report.from_transfer_params({KEY: report.to_transfer_params()})
