"""Observations on two ranks with half of the heads each, against one with all of them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch

from calibrators.interface import (
    Bound,
    Coefficients,
    ColumnMeans,
    HeadOutputs,
    LayerPlan,
    Pool,
    Prefill,
    ProbabilityBlock,
    Prompt,
    Rows,
    Span,
)
from calibrators.settings import CalibrationSettings
from server.engine.agreement import settle
from server.engine.batch import members
from server.engine.step import Planner
from server.kernels import cpu
from server.kernels.partials import PagedCache
from tests.conftest import FakeCalibrator
from tests.server.engine.test_across_heads import HALVES, WHOLE, Meeting, stock
from tests.server.kernels.paging import problem

PROMPT, HEADS, LAYERS = 40, 6, 3
NEIGHBOUR = 20


class SightedSettings(CalibrationSettings):
    """Requests come bound already."""

    method: Literal["sighted"] = "sighted"


class Sighted(FakeCalibrator):
    """Scales heads, and keys of each head, by what it saw of all heads."""

    name: ClassVar = "sighted"
    title: ClassVar = "Sighted"
    Settings: ClassVar = SightedSettings
    causal: ClassVar = False
    pools: ClassVar = ("keys",)
    parameters: ClassVar = ("factor",)

    def __init__(self, start: int = 0) -> None:
        self.start = start

    def prefill(self, bound):
        return Prefill.SPLIT_LAST if bound.params["sees"] == "block" else Prefill.WHOLE

    def rows(self, bound, prompt):
        late = bound.params["sees"] == "block"
        return Rows(first=prompt.length - 1 if late else 0)

    def observe(self, bound, prompt):
        if bound.params["sees"] == "block":
            return [ProbabilityBlock(1, (20, 30), (Span(0, 12),))]
        return [ColumnMeans(1), HeadOutputs(1), HeadOutputs(2)]

    def resolve(self, bound, layer, facts, prompt, observed):
        if bound.params.get("raises_in") == layer and self.start == 3:
            raise RuntimeError("in resolve")
        if not observed:
            return None
        seen = np.concatenate(
            [np.abs(values).reshape(HEADS, -1) for values in observed.values()], 1
        )
        keys = [np.flatnonzero(head[:12] > np.median(seen[:, :12])) for head in seen]
        factor = 1 + seen.mean(1) / seen.mean()
        return LayerPlan(np.ones(HEADS, np.bool_), {"factor": factor}, (Pool(keys),))

    def coefficients(self, masses, parameters):
        factor, mass = parameters["factor"], masses.plain[..., 0]
        factor = factor / factor.mean(1, keepdim=True) if self.across_heads else factor
        rest = 1 / (1 + (factor - 1) * mass)
        return Coefficients(rest, (factor * rest)[..., None], apply=mass > 0)

    across_heads: ClassVar = False


class Coupled(Sighted):
    """Looks across heads too."""

    across_heads: ClassVar = True


def drive(table, shard, gather, stops):
    """Outputs by step and layer, stock ones last; steps end at `stops`, a neighbour decodes."""
    cpu.set_threads(1)
    if gather is not None:
        settle([table.get(name) for name in "az"], gather)
    planner, outputs = Planner(gather), []
    heads, kv = slice(shard.start, shard.stop), slice(shard.start // 3, shard.stop // 3)
    for at, stop in enumerate(stops):
        lengths, spans = [stop, NEIGHBOUR + at + 1], [stop - (0, *stops)[at], 1]
        case = problem(lengths, spans, seed=at)
        cache = PagedCache(case.cache.pages[:, kv].contiguous(), case.cache.block_table)
        query = case.query[:, heads].contiguous()
        plan = planner.plan(members(table, "az", [0, spans[0], spans[0] + 1], lengths))
        outputs.append([stock(case)[:, heads].contiguous() for _ in range(LAYERS + 1)])
        for layer in range(LAYERS):
            plan.apply(layer, query, outputs[-1][layer], cache, case.geometry)
        plan.finish()
    return outputs


@pytest.fixture
def make_rank(make_table, extra_args):
    def make(method, shard, settings):
        table = make_table(method(shard.start), shard=shard)
        table.add("a", extra_args(Bound("sighted", settings, 2, 12)), Prompt(PROMPT), 0)
        table.add("z", extra_args(gamma=0.3), Prompt(NEIGHBOUR), 0)
        return table

    return make


@pytest.fixture
def ranks(make_rank):
    """Tables and outputs of two ranks, side by side, and of one."""

    def make(method, settings, stops):
        meeting, tables = Meeting(), [make_rank(method, shard, settings) for shard in HALVES]
        with ThreadPoolExecutor(2) as pool:
            running = [
                pool.submit(drive, tables[rank], HALVES[rank], meeting.gather(rank), stops)
                for rank in (0, 1)
            ]
            left, right = (each.result() for each in running)
        both = [
            [torch.cat(pair, 1) for pair in zip(*layers, strict=True)]
            for layers in zip(left, right, strict=True)
        ]
        alone = make_rank(method, WHOLE, settings)
        return tables, both, drive(alone, WHOLE, None, stops)

    return make


WAYS = {"whole": (PROMPT, PROMPT + 1), "block": (PROMPT - 1, PROMPT, PROMPT + 1)}


@pytest.mark.parametrize("method", [Sighted, Coupled])
@pytest.mark.parametrize("sees", WAYS)
def test_two_ranks_see_what_one_sees(ranks, method, sees):
    tables, both, one = ranks(method, {"sees": sees}, WAYS[sees])
    assert not any(table.get(name).failed for table in tables for name in "az")
    changed = 0
    for got, want in zip(both, one, strict=True):
        for left, right in zip(got, want, strict=True):
            assert torch.equal(left, right)
        changed += not torch.equal(want[1][:-1], want[-1][:-1])
    assert changed == 2


@pytest.mark.parametrize("method", [Sighted, Coupled])
@pytest.mark.parametrize(("sees", "layer"), [("whole", 1), ("whole", 2), ("block", 2)])
def test_what_fails_on_one_rank_fails_on_both_alone(ranks, method, sees, layer):
    tables, both, one = ranks(method, {"sees": sees, "raises_in": layer}, WAYS[sees])
    assert [[t.get(name).failed for name in "az"] for t in tables] == [[True, False]] * 2
    assert not any(t.get("a").programs[0].active.any() for t in tables)
    for got, want in zip(both, one, strict=True):
        assert torch.equal(got[layer][-1], want[layer][-1])
