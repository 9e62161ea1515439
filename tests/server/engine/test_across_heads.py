"""A method whose coefficients look across the heads of a layer: in effect GIFT, on two ranks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch

from calibrators import reference
from calibrators.interface import Bound, Coefficients, LayerPlan, Masses, Pool, Prompt, Rows
from calibrators.settings import CalibrationSettings
from server.engine.agreement import settle
from server.engine.batch import Member, members, row_map
from server.engine.context import StepContext
from server.engine.programs import HeadShard
from server.engine.ranks import heads_across, united
from server.engine.rewrites import Recombining, rewrite
from server.engine.stack import Stack
from server.engine.step import Planner
from server.kernels import cpu
from server.kernels.partials import PagedCache
from tests.conftest import FakeCalibrator
from tests.server.kernels.paging import Problem, problem

LENGTHS, SPANS, NAMES = [40, 25, 30], [40, 3, 1], "abz"
LAYERS, HEADS = 3, 6
WHOLE, HALVES = HeadShard(0, HEADS), [HeadShard(0, 3), HeadShard(3, 6)]
VISUAL, QUERY = np.arange(2, 14), np.array([15, 17, 18])
WEIGHTS = np.exp(np.linspace(0, 5, len(VISUAL)))
EPS = torch.finfo(torch.float32).eps


class CoupledSettings(CalibrationSettings):
    """Requests come bound already."""

    method: Literal["coupled"] = "coupled"


class Coupled(FakeCalibrator):
    """GIFT's enhancement with a given saliency; goes wrong on one rank where it is told to."""

    name: ClassVar = "coupled"
    title: ClassVar = "Coupled"
    Settings: ClassVar = CoupledSettings
    pools: ClassVar = ("visual", "query")
    parameters: ClassVar = ("beta",)
    across_heads: ClassVar = True

    def __init__(self, start: int = 0) -> None:
        self.start = start

    def goes_wrong(self, bound: Bound, where: str) -> bool:
        return self.start == 3 and bound.params.get("wrong") == where

    def rows(self, bound, prompt):
        if self.goes_wrong(bound, "rows"):
            raise RuntimeError("in rows")
        return Rows(first=20) if self.goes_wrong(bound, "other rows") else Rows(first=14)

    def resolve(self, bound, layer, facts, prompt, observed):
        if self.goes_wrong(bound, "resolve"):
            raise RuntimeError("in resolve")
        if layer == 0 and not self.goes_wrong(bound, "other layers"):
            return None
        heads = np.isin(np.arange(facts.query_heads), bound.params["heads"])
        beta = bound.params["beta"] * np.arange(1, 1 + facts.query_heads, dtype=np.float32)
        weights = None if self.goes_wrong(bound, "no weights") else WEIGHTS
        if bound.params.get("wrong") == "coefficients":
            beta[3] = -1
        return LayerPlan(heads, {"beta": beta}, (Pool(VISUAL, weights), Pool(QUERY)))

    def coefficients(self, masses, parameters):
        assert masses.plain.shape[1] == HEADS
        if self.start == 3 and (parameters["beta"][:, 3] < 0).any():
            raise RuntimeError("in coefficients")
        visual, query = masses.plain.unbind(-1)
        enhanced = masses.weighted[..., 0]
        by_visual, by_query = upper(visual), upper(query)
        share = (enhanced * by_visual).sum(-1, True) / (visual * by_visual).sum(-1, True)
        on_query = torch.where(by_query, parameters["beta"].abs() * share, 1.0)
        rest = 1 - visual - query
        total = torch.where(by_visual, enhanced, visual) + on_query * query + rest
        plain = torch.stack([(~by_visual).to(visual), on_query], -1) / total[..., None]
        weighted = torch.stack([by_visual.to(visual), torch.zeros_like(query)], -1)
        apply = by_visual | by_query
        statistics = {"visual_mass_before": visual}
        return Coefficients(
            1 / total, plain, weighted / total[..., None], apply=apply, statistics=statistics
        )


def upper(mass: torch.Tensor) -> torch.Tensor:
    order = mass.sort(dim=-1, descending=True, stable=True).indices[:, : mass.shape[1] // 2]
    return torch.zeros_like(mass, dtype=torch.bool).scatter(1, order, True)


class Meeting:
    """Gathers between threads. A rank that waits for another in vain gets an exception."""

    def __init__(self) -> None:
        self.barrier = Barrier(2, timeout=30)
        self.sent: list[torch.Tensor] = [torch.empty(0)] * 2
        self.calls = 0

    def gather(self, rank: int):
        def gathered(values):
            self.sent[rank], self.calls = values.clone(), self.calls + 1
            self.barrier.wait()
            assert self.sent[0].shape == self.sent[1].shape
            every = torch.cat(self.sent, 1)
            self.barrier.wait()
            return every

        return gathered


class Rank:
    """One rank's step over the same problem, with its own heads of it."""

    def __init__(self, table, shard, gather=None) -> None:
        cpu.set_threads(1)  # of this Python thread; concurrent parallel kernels are not allowed
        case = problem(LENGTHS, SPANS)
        if gather is not None:
            settle([table.get(name) for name in NAMES], gather)
        heads, kv = slice(shard.start, shard.stop), slice(shard.start // 3, shard.stop // 3)
        cache = PagedCache(case.cache.pages[:, kv].contiguous(), case.cache.block_table)
        query = case.query[:, heads].contiguous()
        self.table = table
        batch = members(table, NAMES, [0, *np.cumsum(SPANS).tolist()], LENGTHS)
        self.plan = Planner(gather).plan(batch)
        self.outputs = [stock(case)[:, heads].contiguous() for _ in range(LAYERS)]
        for layer, output in enumerate(self.outputs):
            self.plan.apply(layer, query, output, cache, case.geometry)

    def failed(self, name: str) -> bool:
        return self.table.get(name).failed


def stock(case: Problem) -> torch.Tensor:
    """Outputs of all rows."""
    values = enumerate(case.values)
    return torch.cat([reference.attend(case.dense(r)[0], v.double()) for r, v in values]).float()


def params(beta=0.3, heads=range(HEADS), **more):
    return {"beta": beta, "heads": [*heads], **more}


@pytest.fixture
def ranks(make_table, extra_args):
    """Two ranks after one step, and one rank with all heads; requests a and b are coupled."""

    def make(a, b, alone_too=True):
        def table(shard):
            made = make_table(Coupled(shard.start), shard=shard)
            for name, given, length in zip("ab", (a, b), (40, 23), strict=True):
                bound = Bound("coupled", given, 2, 2 * HEADS)
                made.add(name, extra_args(bound), Prompt(length), 0)
            made.add("z", extra_args(gamma=0.3), Prompt(30), 0)
            return made

        meeting = Meeting()
        tables = [table(shard) for shard in HALVES]
        with ThreadPoolExecutor(2) as pool:
            running = [
                pool.submit(Rank, tables[rank], HALVES[rank], meeting.gather(rank))
                for rank in (0, 1)
            ]
            two = [each.result() for each in running]
        sent = []
        two[1].plan.finish(lambda shares: sent.append(shares) or shares)
        two[0].plan.finish(lambda shares: united([shares, *sent]))
        one = Rank(table(WHOLE), WHOLE) if alone_too else None
        if one is not None:
            one.plan.finish()
        return two, one

    return make


def rows(name: str) -> slice:
    index = NAMES.index(name)
    return slice(sum(SPANS[:index]), sum(SPANS[: index + 1]))


def assert_equal(two, one, names=NAMES):
    for left, right, whole in zip(two[0].outputs, two[1].outputs, one.outputs, strict=True):
        both = torch.cat([left, right], 1)
        for name in names:
            assert torch.equal(both[rows(name)], whole[rows(name)])


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (params(), params(0.7)),
        (params(heads=[0, 1, 2]), params(heads=[5])),
        (params(heads=[4]), params(heads=[3, 4, 5])),
    ],
    ids=["all heads", "heads of either", "heads of the second rank"],
)
def test_two_ranks_do_what_one_does(ranks, a, b):
    two, one = ranks(a, b)
    assert_equal(two, one)
    changed = one.outputs[1] != stock(problem(LENGTHS, SPANS))
    assert changed[rows("a")][14:].any() and changed[rows("b")].any()
    for name in NAMES:
        got, want = (rank.table.get(name).programs[0].tally for rank in (two[0], one))
        assert (got.prompt_tokens, got.completion_tokens) == (
            want.prompt_tokens,
            want.completion_tokens,
        )
        assert got.count == want.count > 0
        assert got.sums == pytest.approx(want.sums, rel=1e-5)
        assert not two[0].failed(name)


def test_the_equation_holds_on_dense_probabilities(ranks):
    _, one = ranks(params(), params(0.7))
    case, first = problem(LENGTHS, SPANS), 14
    rough, exact = (dense(case, first, dtype) for dtype in (torch.float32, torch.float64))
    budget = 2 * (rough - exact).abs().max() + 32 * EPS * WEIGHTS.max()
    found = one.outputs[1][rows("a")][first:]
    assert (found - exact).abs().max() <= budget
    assert (exact - stock(case)[rows("a")][first:]).abs().max() > 100 * budget


def dense(case: Problem, first: int, dtype: torch.dtype) -> torch.Tensor:
    """What a's calibrated rows come to."""
    p = case.dense(0, dtype)[0][first:]
    inside = [torch.isin(torch.arange(LENGTHS[0]), torch.from_numpy(k)) for k in (VISUAL, QUERY)]
    weights = torch.zeros(LENGTHS[0], dtype=dtype)
    weights[VISUAL] = torch.from_numpy(WEIGHTS).float().to(dtype)
    plain = torch.stack([(p * pool).sum(-1) for pool in inside], -1)
    weighted = torch.stack([(p * weights * pool).sum(-1) for pool in inside], -1)
    masses = Masses(plain, 1 - plain.sum(-1), weighted)
    beta = torch.tensor(0.3).to(dtype) * torch.arange(1, 1 + HEADS)
    asked = Coupled().coefficients(masses, {"beta": beta.expand(plain.shape[:2])})
    factors = [
        asked.pools[..., g, None] + asked.weighted[..., g, None] * weights
        for g in range(len(inside))
    ]
    changed = reference.recombine(p, inside, factors, asked.rest)
    changed = torch.where(asked.apply[..., None], changed, p)
    return reference.attend(changed, case.values[0].to(dtype))


@pytest.mark.parametrize("wrong", ["rows", "resolve", "other rows", "other layers", "no weights"])
def test_a_request_that_differs_between_ranks_fails_on_all_of_them_alone(ranks, wrong):
    two, _ = ranks(params(), params(wrong=wrong), alone_too=False)
    for rank in two:
        assert [rank.failed(name) for name in NAMES] == [False, True, False]
        assert rank.table.get("b").programs == []
    _, one = ranks(params(), params())
    assert_equal(two, one, "az")


def test_coefficients_that_raise_on_one_rank_leave_nobody_waiting(ranks):
    two, _ = ranks(params(), params(wrong="coefficients"), alone_too=False)
    # Which rows it would have calibrated is not known: all of the method fail.
    assert [two[0].failed(name) for name in NAMES] == [True, True, False]


def test_new_requests_are_settled_and_plain_ones_cost_nothing(make_table, extra_args):
    table, calls = make_table(Coupled(), shard=HALVES[0]), []

    def gather(values):
        calls.append(tuple(values.shape))
        return torch.cat([values, values], 1)

    context = StepContext(table, lambda metadata: ["a", "b"], gather=gather)

    def begin(**new):
        requests = [
            SimpleNamespace(
                req_id=name,
                sampling_params=SimpleNamespace(extra_args=arguments),
                prompt_token_ids=[1] * 30,
                num_computed_tokens=0,
            )
            for name, arguments in new.items()
        ]
        context.begin(
            SimpleNamespace(
                scheduled_new_reqs=requests,
                finished_req_ids=set(),
                preempted_req_ids=None,
                num_scheduled_tokens={},
            )
        )

    coupled = extra_args(Bound("coupled", params(), 2, 12))
    begin(p=None)
    begin()
    assert calls == []
    begin(a=coupled, p=None, z=extra_args(gamma=0.3))
    assert calls == [(2, 1, 1)]
    begin()
    assert calls == [(2, 1, 1)]
    assert not table.get("a").failed


def test_a_closed_form_is_of_one_head_and_not_used(add):
    class Closed(Coupled):
        name: ClassVar = "closed"
        rescales: ClassVar = "gamma"

    request = add("a", 4)
    rows = row_map([Member(request, 0, 0, 0, 4)], request.programs)
    way = rewrite(Closed(), Stack.of(request.programs), rows, frozenset())
    assert isinstance(way, Recombining)


class Group:
    """vLLM's group of two ranks, of which the other has the same."""

    world_size = 2
    device = torch.device("cpu")

    def all_gather(self, values, dim):
        assert values.is_contiguous() and values.numel()
        return torch.cat([values, values], dim)


def test_gathering_over_a_group():
    assert heads_across(SimpleNamespace(world_size=1)) is None
    gather = heads_across(Group())
    values = torch.arange(12.0).view(2, 2, 3).transpose(1, 2)
    assert torch.equal(gather(values), torch.cat([values, values], 1))
    assert gather(torch.empty(4, 3, 0)).shape == (4, 6, 0)
