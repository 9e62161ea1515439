"""vLLM's schedulers, passing the workers' reports on to the front end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.engine import FinishReason

from server.engine.arriving import ATTRIBUTE
from server.engine.payload import KEY, Report
from server.engine.prefill import PrefillScheduler

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
    from vllm.v1.outputs import ModelRunnerOutput


class CalibratedScheduler(PrefillScheduler):
    """Scheduler whose outputs carry calibration reports.

    A report rides on every output of its request, not only on the last: a stop string ends a
    request in the front end, which then hears nothing more from the engine.
    """

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Process a step's outputs and attach what was calibrated up to it."""
        reports: Mapping[str, Report] = getattr(model_runner_output, ATTRIBUTE, {})
        poisoned = self._fail([name for name, report in reports.items() if report.failed])
        result: dict[int, EngineCoreOutputs] = super().update_from_output(
            scheduler_output, model_runner_output
        )
        self.kv_cache_manager.evict_blocks(poisoned)
        if reports:
            for outputs in result.values():
                for output in outputs.outputs:
                    _attach(output, reports.get(output.request_id))
        return result

    def _fail(self, request_ids: Sequence[str]) -> set[int]:
        """Have requests end with an error; returns the cache blocks they leave behind.

        The set is the one vLLM ends requests from whose grammar does not compile. Blocks hold
        keys and values of rows that were not calibrated as their salt says.
        """
        failing = [name for name in request_ids if name in self.requests]
        self.grammar_compile_error_reqs.update(failing)
        return {
            block
            for name in failing
            for group in self.kv_cache_manager.get_block_ids(name)
            for block in group
        }


class CalibratedAsyncScheduler(CalibratedScheduler, AsyncScheduler):
    """The same over vLLM's asynchronous scheduler."""


def make_scheduler(vllm_config: VllmConfig, **parts: Any) -> CalibratedScheduler:  # noqa: ANN401
    """What vLLM calls in place of a class, with the arguments of its scheduler.

    Whether scheduling is asynchronous is settled after the class has been named.
    """
    asynchronous = vllm_config.scheduler_config.async_scheduling
    scheduler = CalibratedAsyncScheduler if asynchronous else CalibratedScheduler
    return scheduler(vllm_config=vllm_config, **parts)


def _attach(output: EngineCoreOutput, report: Report | None) -> None:
    if report is None:
        return
    if report.failed and output.finish_reason is not None:
        output.finish_reason = FinishReason.ERROR
    output.kv_transfer_params = {
        **(output.kv_transfer_params or {}),
        KEY: report.to_transfer_params(),
    }
