"""A calibrator's code raises; the worker goes on."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from calibrators.interface import LayerPlan, ModelFacts, Pool, Prompt, Rows, Span, Threshold
from calibrators.zerotuning import ZeroTuning
from server.engine.batch import Member
from server.engine.guard import attempt
from server.engine.payload import KEY, Payload
from server.engine.programs import HeadShard
from server.engine.requests import RequestTable, positions
from server.engine.step import Planner
from tests.server.kernels.paging import problem

FACTS = ModelFacts("Any", 2, 6, 2, 32, 192, 512)
BOUND = ZeroTuning().bind(ZeroTuning.Settings(method="zerotuning", gamma=0.5), FACTS)
KEYS = np.zeros(1, np.int32)
HEADS = np.ones(6, np.bool_)
PLAN = LayerPlan(HEADS, {"gamma": np.ones(6, np.float32)}, (Pool(KEYS),))


def table(calibrator: ZeroTuning) -> RequestTable:
    made = RequestTable({"zerotuning": calibrator}, FACTS, HeadShard(0, 6))
    made.add("one", {KEY: Payload("t", (BOUND,)).to_extra_args()}, Prompt(4), 0)
    return made


class Resolving(ZeroTuning):
    """Resolves to a plan of the test's choosing."""

    def __init__(self, plan):
        self.plan = plan

    def resolve(self, *args, **kwargs):
        if isinstance(self.plan, Exception):
            raise self.plan
        return self.plan


def test_attempt_returns_or_gives_none(caplog):
    assert attempt("some", lambda: 3) == 3
    assert attempt("some", lambda: 1 // 0) is None
    assert "calibrator some raised" in caplog.text


@pytest.mark.parametrize(
    "plan",
    [
        PLAN,
        LayerPlan(HEADS, PLAN.parameters, (Pool(KEYS, above=Threshold(0.1)),)),
        LayerPlan(HEADS, PLAN.parameters, (Pool(Span(1, 10**12)),)),
        LayerPlan(HEADS, PLAN.parameters, (Pool([KEYS] * 6),)),
        LayerPlan(HEADS, PLAN.parameters, (Pool(KEYS, np.ones(1, np.float32)),)),
        LayerPlan(HEADS, PLAN.parameters, (Pool(KEYS),), generated_pools=(Pool(KEYS),)),
        LayerPlan(HEADS, PLAN.parameters, (Pool(KEYS),), statistics={"sinks": 1.0}),
    ],
    ids=str,
)
def test_a_plan_the_engine_can_do(plan):
    assert table(Resolving(plan)).get("one").failed is False


@pytest.mark.parametrize(
    "plan",
    [
        ValueError("in resolve"),
        LayerPlan(HEADS, {}, (Pool(KEYS),)),
        LayerPlan(HEADS[:5], PLAN.parameters, PLAN.pools),
        LayerPlan(HEADS, {"gamma": np.ones(7, np.float32)}, PLAN.pools),
        LayerPlan(HEADS, PLAN.parameters, ()),
        LayerPlan(HEADS, PLAN.parameters, (Pool(KEYS, np.full(1, np.nan, np.float32)),)),
        LayerPlan(HEADS, PLAN.parameters, (Pool(KEYS, np.ones(2, np.float32)),)),
        LayerPlan(HEADS, PLAN.parameters, (Pool(KEYS, [np.ones(1, np.float32)] * 5),)),
        LayerPlan(HEADS, PLAN.parameters, (Pool(KEYS - 1),)),
        LayerPlan(HEADS, PLAN.parameters, (Pool(KEYS[None]),)),
        LayerPlan(HEADS, PLAN.parameters, (Pool(np.array([3, 1], np.int32)),)),
        LayerPlan(HEADS, PLAN.parameters, (Pool(np.array([3, 3], np.int32)),)),
        LayerPlan(HEADS, PLAN.parameters, (Pool(Span(9, 1)),)),
        LayerPlan(HEADS, PLAN.parameters, (Pool(Span(-1, 1)),)),
        LayerPlan(HEADS, PLAN.parameters, (Pool([KEYS] * 5),)),
        LayerPlan(HEADS, PLAN.parameters, (Pool([KEYS] * 5 + [KEYS - 1]),)),
        LayerPlan(HEADS, PLAN.parameters, (Pool(KEYS),), generated_pools=()),
        LayerPlan(HEADS, PLAN.parameters, (Pool(KEYS),), statistics={"sinks": float("nan")}),
    ],
    ids=str,
)
def test_a_plan_it_cannot_do_fails_the_request(plan):
    request = table(Resolving(plan)).get("one")
    assert request.failed is True
    assert request.programs == []


def misshapen(**fields):
    """A calibrator whose coefficients have these fields in place of good ones."""

    class Misshapen(ZeroTuning):
        def coefficients(self, masses, parameters):
            return dataclasses.replace(super().coefficients(masses, parameters), **fields)

    return Misshapen()


class Raising(ZeroTuning):
    def coefficients(self, masses, parameters):
        raise RuntimeError("in coefficients")


@pytest.mark.parametrize(
    "calibrator",
    [
        Raising(),
        misshapen(rest=torch.ones(3, 6)),
        misshapen(rest=torch.ones(4, 7)),
        misshapen(pools=torch.ones(4, 6, 2)),
        misshapen(pools=torch.ones(5, 6, 1)),
        misshapen(apply=torch.ones(4, 5, dtype=torch.bool)),
        misshapen(scale=torch.ones(2, 6)),
        misshapen(statistics={"mean": torch.ones(4, 2)}),
        misshapen(rest=None),
        misshapen(pools=None),
        misshapen(weighted=torch.ones(4, 6, 1)),
    ],
)
def test_coefficients_that_raise_or_do_not_fit_fail_their_requests(calibrator):
    case = problem([4], [4])
    request = table(calibrator).get("one")
    output = torch.randn(4, 6, 32)
    before = output.clone()
    plan = Planner().plan([Member(request, 0, 0, 0, 4)])
    for layer in range(2):
        plan.apply(layer, case.query, output, case.cache, case.geometry)
    plan.finish()
    assert request.failed is True
    assert torch.equal(output, before)


@pytest.mark.parametrize(
    "fields",
    [
        {"rest": torch.full((1, 6), 0.5, dtype=torch.float64)},
        {"rest": torch.full((6, 4), 0.5).T},
        {"pools": torch.full((4, 1, 1), 2.0).to(torch.bfloat16)},
        {"apply": torch.ones(4, 1, dtype=torch.bool)},
        {"scale": torch.full((4, 1), 3.0)},
    ],
    ids=str,
)
def test_what_broadcasts_is_taken(fields):
    case = problem([4], [4])
    request = table(misshapen(**fields)).get("one")
    output = torch.randn(4, 6, 32)
    plan = Planner().plan([Member(request, 0, 0, 0, 4)])
    plan.apply(0, case.query, output, case.cache, case.geometry)
    plan.finish()
    assert request.failed is False
    assert torch.isfinite(output).all()


def test_rows_may_leave_generated_tokens_alone():
    assert positions(Rows(), 2, 8, 5).tolist() == [2, 3, 4, 5, 6, 7]
    assert positions(Rows(generated=False), 2, 8, 5).tolist() == [2, 3, 4]
    assert positions(Rows(generated=False), 6, 8, 5).tolist() == []
