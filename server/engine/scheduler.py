"""vLLM's scheduler, passing the workers' reports on to the front end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.core.sched.scheduler import Scheduler

from server.engine.payload import KEY
from server.engine.worker import ATTRIBUTE

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.outputs import ModelRunnerOutput


class CalibratedScheduler(Scheduler):
    """Scheduler whose outputs carry calibration reports.

    A report rides on every output of its request, not only on the last: a stop string ends a
    request in the front end, which then hears nothing more from the engine.
    """

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Process a step's outputs and attach what was calibrated up to it."""
        result: dict[int, EngineCoreOutputs] = super().update_from_output(
            scheduler_output, model_runner_output
        )
        reports = getattr(model_runner_output, ATTRIBUTE, None)
        if reports:
            for outputs in result.values():
                for output in outputs.outputs:
                    report = reports.get(output.request_id)
                    if report is not None:
                        output.kv_transfer_params = {
                            **(output.kv_transfer_params or {}),
                            KEY: report.to_transfer_params(),
                        }
        return result
