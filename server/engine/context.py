"""What a worker's metadata builders and attention layers share within a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from calibrators.interface import Prompt
from server.engine.agreement import settle
from server.engine.batch import members
from server.engine.payload import Report
from server.engine.progress import Reports
from server.engine.ranks import Gather, Union, alone
from server.engine.requests import RequestTable
from server.engine.run import Run
from server.engine.stack import HOST
from server.engine.step import Planner, StepPlan

if TYPE_CHECKING:
    import torch
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput


class StepContext:
    """One worker's calibration, from the scheduler's output to the report.

    Args:
        table: state of calibrated requests.
        request_ids: ids by row of the batch, as the model runner orders them right now.
        union: brings what the ranks did together.
        gather: brings their heads together; None where this one has them all.
        follow: has the residual stream shown to the plan on its way into these layers, and no
            others.
        device: where the layers are computed.
    """

    def __init__(
        self,
        table: RequestTable,
        request_ids: Callable[[CommonAttentionMetadata], Sequence[str]],
        union: Union = alone,
        gather: Gather | None = None,
        follow: Callable[[Iterable[int]], None] = lambda _: None,
        device: torch.device = HOST,
    ) -> None:
        self._table = table
        self._request_ids = request_ids
        self._union = union
        self._gather = gather
        self._follow = follow
        self._planner = Planner(gather, device)
        self._scheduled: list[str] = []
        self._preempted: set[str] = set()
        self._plan: StepPlan | None = None
        self._run: Run | None = None
        # Ranks add up what they did in every step, and a device has rows of its own.
        self._repeats = union is alone and gather is None and device.type == "cpu"

    def begin(self, scheduler_output: SchedulerOutput) -> None:
        """Take up and forget requests as the scheduler says. Ids may be reused in one step."""
        finished = scheduler_output.finished_req_ids
        self._planner.forget(self._table.drop(finished))
        self._preempted = (
            self._preempted | (scheduler_output.preempted_req_ids or set())
        ) - finished
        news = [new for new in scheduler_output.scheduled_new_reqs if not self._returns(new.req_id)]
        for new in news:
            self._take_up(new)
        if self._gather is not None:
            settle([self._table.get(new.req_id) for new in news], self._gather)
        if self._run is not None and self._run.changes != self._table.changes:
            self._run.end()
            self._run = None
        self._plan = None
        self._follow(())
        self._scheduled = [
            request_id
            for request_id in (scheduler_output.num_scheduled_tokens if len(self._table) else ())
            if self._table.get(request_id) is not None
        ]

    def _returns(self, request_id: str) -> bool:
        """Whether a request comes back that was preempted: the V2 runner is told of it anew."""
        returns = request_id in self._preempted
        self._preempted.discard(request_id)
        return returns

    def _take_up(self, new: NewRequestData) -> None:
        params = new.sampling_params
        # A client may send embeddings in place of tokens.
        given = new.prompt_embeds if new.prompt_token_ids is None else new.prompt_token_ids
        self._table.add(
            new.req_id,
            params.extra_args if params is not None else None,
            Prompt(length=len(given)),
            new.num_computed_tokens,
        )

    def plan(self, metadata: CommonAttentionMetadata) -> StepPlan | None:
        """The plan of the running step; None where no calibrated request takes part.

        Called once per group of attention layers; they all share one plan, since a batch's rows
        are in the same order for each.
        """
        if self._plan is None and self._scheduled:
            rows = metadata.num_reqs
            names = self._request_ids(metadata)[:rows]
            starts = metadata.query_start_loc_cpu[: rows + 1].numpy()
            lengths = _lengths(metadata)[:rows].numpy()
            if self._run is not None:
                if self._run.goes_on(names, starts, lengths):
                    self._plan = self._run.plan
                    return self._plan
                self._run.end()
                self._run = None
            batch = members(self._table, names, starts.tolist(), lengths.tolist())
            self._plan = self._planner.plan(batch)
            if self._repeats and Run.begins(self._plan):
                self._run = Run(self._plan, self._table.changes, names, lengths)
            self._follow(self._plan.followed())
        return self._plan

    @property
    def calibrates(self) -> bool:
        """Whether any request of the running step is calibrated."""
        return bool(self._scheduled)

    def finish(self) -> Reports:
        """End the step; what was done."""
        plan, scheduled = self._plan, self._scheduled
        self._plan, self._scheduled = None, []
        if plan is None:
            return {}
        run, seconds = self._run, None
        if run is not None and run.under_way:
            progress = run.finish()
            if progress is not None:
                return progress
            seconds, self._run = run.end(), None
        else:
            seconds = plan.finish(self._union)
        return self._reports(scheduled, seconds)

    def _reports(self, scheduled: Sequence[str], seconds: Mapping[str, float] | None) -> Reports:
        reports = {}
        for request_id in scheduled:
            request = self._table.get(request_id)
            if request is not None:
                tallies = [program.tally for program in request.programs]
                report = Report(request.ticket, tallies, seconds, request.failed)
                reports[request_id] = report.settled()
                seconds = None
        return reports


def _lengths(metadata: CommonAttentionMetadata) -> torch.Tensor:
    """Tokens of each request after the step, on the host.

    vLLM's bound on the host is exact where nothing is drafted, which start-up sees to. To read the
    lengths themselves from an accelerator would wait for it.
    """
    exact: torch.Tensor = metadata.seq_lens
    if exact.device.type == "cpu":
        return exact
    bound: torch.Tensor | None = metadata.seq_lens_cpu_upper_bound
    return exact if bound is None else bound
