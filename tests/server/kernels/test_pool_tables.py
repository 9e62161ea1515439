"""Pools by head, by threshold, as spans, and others for generated rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrators import reference
from server.kernels.partials import Partials, PoolTable
from tests.server.kernels.paging import WAYS, Problem, measured, values
from tests.server.kernels.test_properties import EPS, pool_map, problems, weight_rounding

EVERY = (-1.0, 0.0)


@st.composite
def tables(draw, cases=None) -> tuple[Problem, list[dict[str, Any]], PoolTable]:
    """A problem, a dictionary per set, and the table of them."""
    case = draw(problems() if cases is None else cases)
    query_heads = case.query.shape[1]
    by_head = draw(st.booleans())
    sets, prompts, described = [], [], []
    for key in case.keys:
        prompts.append(draw(st.integers(1, len(key) + 1)))
        sets.append([])
        for _ in ("prompt", "generated"):
            wide = query_heads if by_head else 1
            own = draw(st.lists(st.integers(0, 2), min_size=wide, max_size=wide))
            own *= query_heads // wide
            sets[-1].append([len(described) + n for n in own])
            described += [draw(one_set(len(key))) for _ in range(3)]
    table = PoolTable(
        pool_map([one["listed"] for one in described]),
        torch.tensor([one["spans"] for one in described], dtype=torch.int32),
        torch.tensor([one["above"] for one in described]),
        torch.tensor(sets, dtype=torch.int32),
        torch.tensor(prompts, dtype=torch.int32),
    )
    return case, described, table


@st.composite
def one_set(draw, keys: int) -> dict[str, Any]:
    """Two pools: a span that may reach beyond the keys, and a list behind it."""
    edge = draw(st.integers(0, keys))
    start = draw(st.integers(0, edge))
    spanned = draw(st.booleans())
    listed = sorted(draw(st.sets(st.integers(edge, keys), max_size=5)) - {keys})
    above = st.sampled_from([EVERY, (0.02, 0.0), (0.2, 0.0), (0.0, 0.5), (0.0, 2.0)])
    stop = edge if listed else draw(st.sampled_from([edge, 10**9]))
    return {
        "listed": [[], listed],
        "spans": [[start, stop] if spanned else [0, 0], [0, 0]],
        "above": [draw(above), draw(above)],
    }


def member(case: Problem, described: list, table: PoolTable, request: int, pool: int):
    """bool `[rows, heads, keys]` and the threshold of each row and head."""
    keys, span = len(case.keys[request]), case.spans[request]
    heads = case.query.shape[1]
    inside = torch.zeros(span, heads, keys, dtype=torch.bool)
    bound = torch.zeros(span, heads, 1, dtype=torch.float64)
    for row in range(span):
        position = keys - span + row
        generated = int(position >= table.prompts[request])
        for head in range(heads):
            one = described[table.sets[request, generated, head]]
            inside[row, head, one["listed"][pool]] = True
            inside[row, head, slice(*one["spans"][pool])] = True
            absolute, relative = one["above"][pool]
            bound[row, head] = absolute + relative / (position + 1)
    return inside, bound


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=80)
@given(drawn=tables())
def test_tables_match_the_reference(way, drawn):
    case, _, table = drawn
    heads = torch.ones(len(case.keys), case.query.shape[1], dtype=torch.bool)
    got = measured(case, heads, table, way)
    got = Partials(got.pools, got.mass, values(case, got))
    assert_matches(got, drawn, pools_rounding=0)


def assert_matches(got: Partials, drawn, pools_rounding: float) -> None:
    """Measured partials are those of full probability rows."""
    case, described, table = drawn
    start = 0
    for request, value in enumerate(case.values):
        rows = slice(start, start + case.spans[request])
        start = rows.stop
        rough, exact = (case.dense(request, t)[0] for t in (torch.float32, torch.float64))
        # What float32 cannot tell from the threshold may fall on either side.
        error = 2 * (rough.double() - exact).abs().max().item() + 32 * EPS
        left = exact.clone()
        all_slack = torch.zeros_like(exact[..., 0])
        for pool in (0, 1):
            inside, bound = member(case, described, table, request, pool)
            counted = torch.where(inside & (exact > bound), exact, 0)
            doubtful = torch.where(inside & ((exact - bound).abs() <= error), exact, 0)
            slack = doubtful.sum(-1) + error * inside.sum(-1)
            assert ((got.mass[rows, :, pool] - counted.sum(-1)).abs() <= slack + error).all()
            difference = got.value[rows, :, pool] - reference.attend(counted, value.double())
            most = value.double().abs().max()
            budget = (slack + error) * most + pools_rounding
            assert (difference.abs() <= budget[..., None]).all()
            left, all_slack = left - counted, all_slack + slack
        sums = left.sum(-1) + 1 - exact.sum(-1)
        assert ((got.mass[rows, :, 2] - sums).abs() <= all_slack + error).all()
        difference = got.value[rows, :, 2] - reference.attend(left, value.double())
        budget = (all_slack + error) * most + weight_rounding(case)
        assert (difference.abs() <= budget[..., None]).all()
