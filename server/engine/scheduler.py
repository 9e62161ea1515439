"""vLLM's schedulers, passing the workers' reports on to the front end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.engine import FinishReason

from server.engine.arriving import ATTRIBUTE
from server.engine.payload import KEY, Report
from server.engine.prefill import PrefillScheduler
from server.engine.progress import Progress, Reports, report_of, seconds_of

# Steps from one report on a request that goes on to the next.
EVERY = 16

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
    from vllm.v1.outputs import ModelRunnerOutput


class CalibratedScheduler(PrefillScheduler):
    """Scheduler whose outputs carry calibration reports.

    A report rides on the last output of its request; on all of a request with stop strings, which
    ends in the front end, that then hears nothing more from the engine; and now and then on those
    of others, so that little is lost of what was done for a request whose client leaves.
    """

    _before: Mapping[str, Report] = MappingProxyType({})
    _seconds: Mapping[str, float] = MappingProxyType({})
    _steps = 0

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Process a step's outputs and attach what was calibrated up to it."""
        reports: Reports = getattr(model_runner_output, ATTRIBUTE, {})
        failed = []
        if not isinstance(reports, Progress) and reports:
            self._before = reports
            failed = [name for name, report in reports.items() if report.failed]
        poisoned = self._fail(failed)
        result: dict[int, EngineCoreOutputs] = super().update_from_output(
            scheduler_output, model_runner_output
        )
        self.kv_cache_manager.evict_blocks(poisoned)
        if reports:
            self._report(reports, [each for batch in result.values() for each in batch.outputs])
        return result

    def _report(self, reports: Reports, outputs: Sequence[EngineCoreOutput]) -> None:
        """Attach the reports that are awaited, and one in any case, with the step's seconds.

        A step without outputs has its seconds counted with those of the next.
        """
        self._steps += 1
        seconds = _added(self._seconds, seconds_of(reports))
        for output in outputs:
            report = None
            if seconds or self._awaited(output):
                report = report_of(output.request_id, reports, self._before)
            if report is not None:
                _attach(output, replace(report, seconds=seconds) if seconds else report)
                seconds = {}
        self._seconds = seconds

    def _awaited(self, output: EngineCoreOutput) -> bool:
        """Whether a report has to ride on an output."""
        request = self.requests.get(output.request_id)
        if request is None or output.finish_reason is not None or self._steps % EVERY == 0:
            return True
        return bool(request.sampling_params and request.sampling_params.stop)

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


def _added(seconds: Mapping[str, float], more: Mapping[str, float]) -> Mapping[str, float]:
    names = {*seconds, *more}
    return {name: seconds.get(name, 0.0) + more.get(name, 0.0) for name in sorted(names)}


def _attach(output: EngineCoreOutput, report: Report) -> None:
    if report.failed and output.finish_reason is not None:
        output.finish_reason = FinishReason.ERROR
    output.kv_transfer_params = {
        **(output.kv_transfer_params or {}),
        KEY: report.to_transfer_params(),
    }
