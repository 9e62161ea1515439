"""Pools with weights per key, from the plans to the rewritten rows, against the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrators import reference
from calibrators.interface import LayerPlan, Pool
from server.engine.pools import LayerPools, stacked
from server.kernels import cpu
from tests.server.kernels.paging import WAYS, Problem, measured, stock, values
from tests.server.kernels.test_properties import EPS, problems, weight_rounding

POOLS = 2


@dataclass
class Weighted:
    """A problem with two pools per request and what they are as dense tensors.

    `inside` and `weights` are `[query_heads, pools, keys]` per request; weights are 0 outside.
    """

    case: Problem
    plans: list[LayerPlan]
    inside: list[torch.Tensor]
    weights: list[torch.Tensor]

    @property
    def query_heads(self) -> int:
        return self.case.query.shape[1]

    def stacked(self) -> Any:
        every = slice(0, self.query_heads)
        pools = [LayerPools.of(plan, POOLS, self.query_heads, every) for plan in self.plans]
        return stacked(pools, [len(key) for key in self.case.keys], self.query_heads)


@st.composite
def weighted(draw) -> Weighted:
    """Pools empty, whole or between; keys and weights for all heads, by head, or no weights."""
    made = Weighted(draw(problems()), [], [], [])
    heads = made.query_heads
    random = np.random.default_rng(draw(st.integers(0, 2**20)))
    spread = draw(st.sampled_from([0.0, 1.0, 10.0]))
    for key in made.case.keys:
        shares = draw(st.sampled_from([(1, 0, 0), (0, 0, 1), (0.3, 0.1, 0.6), (0.5, 0.5, 0)]))
        by_head = draw(st.booleans())
        owner = random.choice(3, (heads if by_head else 1, len(key)), p=shares)
        owner = np.broadcast_to(owner, (heads, len(key)))
        inside = np.stack([owner == pool for pool in range(POOLS)], 1)
        each, pools = np.zeros(inside.shape, np.float32), []
        for pool in range(POOLS):
            keys = [np.flatnonzero(inside[head, pool]) for head in range(heads)]
            kind = draw(st.sampled_from(["none", "all", "by head"]))
            kind = "by head" if by_head and kind == "all" else kind
            if kind != "none":
                shape = heads if kind == "by head" else 1, len(key)
                each[:, pool] = np.exp(random.uniform(0, spread, shape)) * random.choice([-1, 1, 1])
            listed = [each[head, pool, keys[head]] for head in range(heads)]
            given_weights = {"none": None, "all": listed[0], "by head": listed}[kind]
            pools.append(Pool(keys if by_head else keys[0], given_weights))
        made.plans.append(LayerPlan(np.ones(heads, np.bool_), {}, tuple(pools)))
        made.inside.append(torch.from_numpy(inside))
        made.weights.append(torch.from_numpy(np.where(inside, each, 0)))
    return made


def within(
    found: torch.Tensor,
    rough: torch.Tensor,
    exact: torch.Tensor,
    most: float,
    rounding: float = 0,
) -> bool:
    """Twice the error of an independent float32 run, plus rounding of terms as large as `most`."""
    budget = 2 * (rough.double() - exact).abs().max().item() + 32 * EPS * max(1.0, most) + rounding
    return (found.double() - exact).abs().max().item() <= budget


def partials(made: Weighted, request: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Masses, plain and weighted, and value sums of a request from dense probabilities."""
    p, value = made.case.dense(request, dtype)[0], made.case.values[request].to(dtype)
    sides = made.inside[request].to(dtype), made.weights[request].to(dtype)
    parts = [p * side[:, pool] for side in sides for pool in range(POOLS)]
    sums = torch.stack([part.sum(-1) for part in parts], -1)
    return [sums, torch.stack([reference.attend(part, value) for part in parts], 2)]


def largest(made: Weighted, *, weighted: bool = True) -> float:
    """The largest value, times its weight or not."""
    weights = made.weights if weighted else []
    weight = max([1.0, *(each.abs().max().item() for each in weights)])
    return weight * max(1.0, *(value.abs().max().item() for value in made.case.values))


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=80)
@given(made=weighted())
def test_partials_match_the_reference(way, made):
    pools = made.stacked()
    heads = torch.ones(len(made.plans), made.query_heads, dtype=torch.bool)
    got = measured(made.case, heads, pools, way)
    value = values(made.case, got)
    some = any(pool.weights is not None for plan in made.plans for pool in plan.pools)
    columns = 2 * POOLS if some else POOLS
    assert (got.pools, got.mass.shape[2], value.shape[2]) == (POOLS, columns + 1, columns + 1)
    requests = range(len(made.plans))
    rough, exact = (
        [torch.cat(parts) for parts in zip(*(partials(made, r, t) for r in requests), strict=True)]
        for t in (torch.float32, torch.float64)
    )
    for found, near, true in zip((got.mass, value), rough, exact, strict=True):
        for at in (slice(POOLS), slice(POOLS, columns)):
            most = largest(made, weighted=at.start is not None)
            if at.start != columns:
                assert within(found[:, :, at], near[:, :, at], true[:, :, at], most)


def rewritten(made: Weighted, dtype: torch.dtype, c: torch.Tensor, rest: torch.Tensor):
    """Outputs of the pool algebra on dense probabilities."""
    outputs, start = [], 0
    for request, span in enumerate(made.case.spans):
        rows, start = slice(start, start + span), start + span
        p, value = made.case.dense(request, dtype)[0], made.case.values[request].to(dtype)
        inside, weights = made.inside[request], made.weights[request].to(dtype)
        factors = [
            c[rows, :, pool, None].to(dtype)
            + c[rows, :, POOLS + pool, None].to(dtype) * weights[:, pool]
            for pool in range(POOLS)
        ]
        pools = [inside[:, pool] for pool in range(POOLS)]
        changed = reference.recombine(p, pools, factors, rest[rows].to(dtype))
        outputs.append(reference.attend(changed, value))
    return torch.cat(outputs)


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=60)
@given(made=weighted(), data=st.data())
def test_recombined_rows_match_the_reference(way, made, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    count, heads, _ = made.case.query.shape
    c = 2 * torch.rand(count, heads, 2 * POOLS, generator=generator)
    rest = 2 * torch.rand(count, heads, generator=generator)
    selected = torch.rand(len(made.plans), heads, generator=generator) < 0.8
    touched = selected[made.case.rows.slot.long()]

    plain = stock(made.case).float()
    output = plain.clone()
    got = measured(made.case, selected, made.stacked(), way)
    assert got.mass[~touched].count_nonzero() == 0
    assert values(made.case, got)[~touched].count_nonzero() == 0
    factors = torch.cat([c[..., : got.mass.shape[2] - 1], rest[..., None]], -1)
    assert cpu.combine(output, made.case.rows, touched, got, factors).all()

    assert torch.equal(output[~touched], plain[~touched])
    if touched.any():
        rough, exact = (rewritten(made, t, c, rest) for t in (torch.float32, torch.float64))
        rounding = rest.max().item() * weight_rounding(made.case)
        near, true = rough[touched], exact[touched]
        assert within(output[touched], near, true, 4 * largest(made), rounding)
