"""State of calibrated requests in a worker, keyed by request id."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from calibrators.interface import Bound, Calibrator, LayerPlan, ModelFacts, Pool, Prompt, Rows
from server.engine.guard import attempt
from server.engine.payload import Payload, Tally

if TYPE_CHECKING:
    from calibrators.interface import BoolArray, FloatArray, IntArray


@dataclass(frozen=True, slots=True)
class HeadShard:
    """The query heads of this tensor-parallel rank: `start <= head < stop` of the model."""

    start: int
    stop: int


@dataclass(slots=True)
class Program:
    """One calibration of one request, resolved for every layer of this rank.

    Attributes:
        calibrator: its method.
        rows: which positions are calibrated.
        heads: bool `[layers, heads of this rank]`.
        parameters: float32 of the same shape, by name.
        pools: per layer, int32 keys of each pool.
        tally: what was done so far.
    """

    calibrator: Calibrator
    rows: Rows
    heads: BoolArray
    parameters: Mapping[str, FloatArray]
    pools: list[tuple[IntArray, ...]]
    tally: Tally = field(default_factory=Tally)


@dataclass(slots=True)
class CalibratedRequest:
    """A request with its programs.

    Attributes:
        ticket: finds the receipt in the front end.
        prompt: geometry of the prompt.
        programs: one per calibration, in order.
        covered: positions below this are in the tallies; recomputing them after a preemption
            adds nothing.
        failed: a result was not finite; the request will be answered with an error.
    """

    ticket: str
    prompt: Prompt
    programs: list[Program]
    covered: int = 0
    failed: bool = False


class RequestTable:
    """Calibrated requests by id, from the step that schedules them to the one that frees them.

    A request that is preempted stays: it comes back with the same id and settings.
    """

    def __init__(
        self, calibrators: Mapping[str, Calibrator], facts: ModelFacts, shard: HeadShard
    ) -> None:
        self._calibrators = calibrators
        self._facts = facts
        self._shard = shard
        self._requests: dict[str, CalibratedRequest] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def get(self, request_id: str) -> CalibratedRequest | None:
        """The request, None if it is plain."""
        return self._requests.get(request_id)

    def add(
        self, request_id: str, extra_args: Mapping[str, Any] | None, prompt: Prompt, cached: int
    ) -> None:
        """Take up a newly scheduled request; whatever had this id before is overwritten.

        Args:
            request_id: the engine's id.
            extra_args: of its sampling parameters.
            prompt: geometry of the prompt.
            cached: prompt tokens whose KV came out of the prefix cache.
        """
        payload = Payload.from_extra_args(extra_args)
        if payload is None:
            self._requests.pop(request_id, None)
            return
        made = [
            attempt(bound.method, partial(self._program, bound, prompt))
            for bound in payload.calibrations
        ]
        programs = [program for program in made if program is not None]
        for program in programs:
            skipped = positions(program.rows, 0, min(cached, prompt.length), prompt.length)
            program.tally.prompt_tokens = len(skipped)
        self._requests[request_id] = CalibratedRequest(
            payload.ticket, prompt, programs, covered=cached, failed=None in made
        )

    def drop(self, request_ids: Iterable[str]) -> None:
        """Forget finished and aborted requests."""
        for request_id in request_ids:
            self._requests.pop(request_id, None)

    def _program(self, bound: Bound, prompt: Prompt) -> Program:
        calibrator = self._calibrators[bound.method]
        plans = [
            calibrator.resolve(bound, layer, self._facts, prompt, {})
            for layer in range(self._facts.layers)
        ]
        return Program(
            calibrator,
            calibrator.rows(bound, prompt),
            np.stack([self._local_heads(plan) for plan in plans]),
            {
                name: np.stack([self._local_parameter(plan, name) for plan in plans])
                for name in calibrator.parameters
            },
            [_pool_keys(calibrator, plan) for plan in plans],
        )

    def _local_heads(self, plan: LayerPlan | None) -> BoolArray:
        heads = np.zeros(self._facts.query_heads) if plan is None else plan.heads
        return self._local(heads).astype(np.bool_)

    def _local_parameter(self, plan: LayerPlan | None, name: str) -> FloatArray:
        values = np.zeros(self._facts.query_heads) if plan is None else plan.parameters[name]
        return self._local(values).astype(np.float32)

    def _local(self, per_head: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if per_head.shape != (self._facts.query_heads,):
            raise ValueError(f"a plan has {per_head.shape} in place of one entry per query head")
        return per_head[self._shard.start : self._shard.stop]


def _pool_keys(calibrator: Calibrator, plan: LayerPlan | None) -> tuple[IntArray, ...]:
    if plan is None:
        return (np.empty(0, np.int32),) * len(calibrator.pools)
    if len(plan.pools) != len(calibrator.pools):
        raise ValueError(f"a plan has {len(plan.pools)} pools, not {len(calibrator.pools)}")
    if plan.generated_pools is not None or plan.statistics:
        raise NotImplementedError("pools of generated rows and statistics of layers")
    return tuple(_keys(pool) for pool in plan.pools)


def _keys(pool: Pool) -> IntArray:
    if isinstance(pool.keys, np.ndarray) and pool.weights is None and pool.above is None:
        return pool.keys.astype(np.int32)
    raise NotImplementedError("pools with weights, thresholds, spans or keys per head")


def positions(rows: Rows, start: int, stop: int, prompt_length: int) -> IntArray:
    """Calibrated positions among `start <= i < stop`, int32, ascending."""
    if not rows.generated:
        stop = min(stop, prompt_length)
    chosen = np.arange(max(start, rows.first), max(stop, rows.first, start), dtype=np.int32)
    for span in rows.skip:
        chosen = chosen[(chosen < span.start) | (chosen >= span.stop)]
    return chosen
