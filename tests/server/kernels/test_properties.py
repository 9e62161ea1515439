"""Properties of the CPU kernels over random shapes, types and pools."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrators import reference
from calibrators.interface import Masses
from calibrators.zerotuning import ZeroTuning
from server.kernels import cpu
from server.kernels.partials import Changes, PoolMap
from tests.server.kernels.paging import WAYS, Problem, attention, measured, problem, stock, values

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
EPS = torch.finfo(torch.float32).eps


@st.composite
def problems(draw, whole: bool = False) -> Problem:
    """Up to three requests, their lengths around the edges of pages and tiles.

    `whole` gives all rows of each.
    """
    block = draw(st.sampled_from([32, 64, 128]))
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 7), (2, 3), (3, 1), (2, 4)]))
    edges = st.sampled_from([1, 2, 15, 16, 17, block - 1, block, block + 1, 2 * block, 3 * block])
    lengths = draw(st.lists(edges | st.integers(1, 300), min_size=1, max_size=3))
    spans = [n if whole else draw(st.sampled_from([1, n, min(n, 16), min(n, 33)])) for n in lengths]
    return problem(
        lengths,
        spans,
        dtype=draw(DTYPES),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([32, 64, 96])),
        block=block,
        seed=draw(st.integers(0, 2**20)),
        window=draw(st.sampled_from([0, 0, 1, 20, 200])),
        soft_cap=draw(st.sampled_from([0.0, 0.0, 3.0])),
        alibi=draw(st.booleans()),
        sinks=draw(st.booleans()),
    )


def pool_map(draw_keys: list[list[list[int]]]) -> PoolMap:
    """`draw_keys[slot][pool]`, ascending."""
    offsets, keys = [], []
    for pools in draw_keys:
        ends = [len(keys)]
        for pool in pools:
            keys += pool
            ends.append(len(keys))
        offsets.append(ends)
    return PoolMap(torch.tensor(keys, dtype=torch.int32), torch.tensor(offsets, dtype=torch.int32))


@st.composite
def pooled(draw) -> tuple[Problem, list[list[list[int]]]]:
    """A problem with two disjoint pools per request: empty, whole or anything between."""
    case = draw(problems())
    pools = []
    for key in case.keys:
        owner = draw(
            st.one_of(
                st.just([0] * len(key)),
                st.just([2] * len(key)),
                st.lists(st.integers(0, 2), min_size=len(key), max_size=len(key)),
            )
        )
        pools.append([[j for j, g in enumerate(owner) if g == pool] for pool in (0, 1)])
    return case, pools


def dense(
    case: Problem, pools: list[list[list[int]]], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masses and value sums of the pools and of the rest, from full probability rows."""
    masses, values = [], []
    for request, value in enumerate(case.values):
        p, _ = case.dense(request, dtype)
        parts, rest = [], p.clone()
        for pool in pools[request]:
            inside = torch.zeros_like(p)
            inside[..., pool] = p[..., pool]
            rest[..., pool] = 0
            parts.append(inside)
        gone = 1 - p.sum(-1)
        sums = [*(part.sum(-1) for part in parts), rest.sum(-1) + gone]
        masses.append(torch.stack(sums, -1))
        values.append(
            torch.stack([reference.attend(x, value.to(dtype)) for x in (*parts, rest)], 2)
        )
    return torch.cat(masses), torch.cat(values)


def weight_rounding(case: Problem) -> float:
    """What rounding the rest's weights to the model's type may change."""
    return torch.finfo(case.query.dtype).eps / 2 * max(v.abs().max().item() for v in case.values)


def within(
    found: torch.Tensor, rough: torch.Tensor, exact: torch.Tensor, rounding: float = 0
) -> bool:
    """Twice the error of an independent float32 run, plus a band of float32 rounding."""
    band = 32 * EPS * max(1.0, exact.abs().max().item()) + rounding
    budget = 2 * (rough.double() - exact).abs().max().item() + band
    return (found.double() - exact).abs().max().item() <= budget


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=120)
@given(drawn=pooled())
def test_partials_match_the_reference(way, drawn):
    case, pools = drawn
    heads = torch.ones(len(pools), case.query.shape[1], dtype=torch.bool)
    got = measured(case, heads, pool_map(pools), way)
    value = values(case, got)
    rough, exact = dense(case, pools, torch.float32), dense(case, pools, torch.float64)
    assert torch.isfinite(got.mass).all() and torch.isfinite(value).all()
    assert within(got.mass, rough[0], exact[0])
    assert within(value[:, :, :-1], rough[1][:, :, :-1], exact[1][:, :, :-1])
    last = (part[:, :, -1] for part in (value, rough[1], exact[1]))
    assert within(*last, weight_rounding(case))


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=60)
@given(case=problems(), data=st.data())
def test_only_selected_heads_are_touched(way, case, data):
    count, query_heads, _ = case.query.shape
    chosen = data.draw(
        st.lists(st.booleans(), min_size=query_heads, max_size=query_heads), label="heads"
    )
    heads = torch.tensor([chosen] * len(case.keys))
    keys = [[[0]] for _ in case.keys]
    partials = measured(case, heads, pool_map(keys), way)
    value = values(case, partials)
    assert partials.mass[:, ~heads[0]].count_nonzero() == 0
    assert value[:, ~heads[0]].count_nonzero() == 0
    output = stock(case).to(case.query.dtype)
    before = output.clone()
    halves = torch.full((count, query_heads, 2), 0.5)
    cpu.combine(output, case.rows, heads[case.rows.slot.long()], partials, halves)
    assert torch.equal(output[:, ~heads[0]], before[:, ~heads[0]])
    # Sums in another order: terms that cancel are rounded all the same.
    halved, terms = value[:, heads[0]].sum(2) / 2, max(v.abs().max() for v in case.values)
    close = torch.finfo(case.query.dtype).eps
    torch.testing.assert_close(
        output[:, heads[0]].float(), halved, atol=32 * EPS * terms.item(), rtol=close
    )


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=40)
@given(case=problems())
def test_a_pool_of_all_keys_is_the_whole_attention(way, case):
    keys = [[list(range(len(key)))] for key in case.keys]
    heads = torch.ones(len(keys), case.query.shape[1], dtype=torch.bool)
    got = measured(case, heads, pool_map(keys), way)
    whole = torch.cat([case.dense(r)[0].sum(-1) for r in range(len(keys))])
    torch.testing.assert_close(got.mass[..., 0].double(), whole, atol=2e-5, rtol=0)


@settings(max_examples=80)
@given(pooled(), st.data())
def test_rescaling_is_partials_and_combine_in_one(drawn, data):
    """With ZeroTuning's own coefficients, which declare that they have this closed form."""
    case, pools = drawn
    count, query_heads, _ = case.query.shape
    factors = st.sampled_from([0.01, 0.5, 1.0, 3.0, 100.0])
    factor = torch.tensor([[data.draw(factors) for _ in range(query_heads)] for _ in pools])
    heads = torch.tensor([[data.draw(st.booleans()) for _ in range(query_heads)] for _ in pools])
    slot, only = case.rows.slot.long(), pool_map([slot[:1] for slot in pools])
    whole = (reference.attend(case.dense(r)[0], v.double()) for r, v in enumerate(case.values))
    stock = torch.cat([*whole]).to(case.query.dtype)
    kernels = attention(case, heads)

    changes = Changes.none(count, query_heads)
    output = stock.clone()
    corrected = torch.zeros(len(pools), dtype=torch.bool)
    kernels.rescale(output, only, factor, corrected, changes)

    partials = kernels.divided(only)
    touched = heads[slot] & (partials.mass[..., 0] > 0)
    assert torch.equal(changes.count, touched.int())
    assert changes.finite.all()
    torch.testing.assert_close(changes.before, partials.mass[..., 0] * touched, atol=4e-6, rtol=0)

    # Where the pool has nearly all of a row, two ways to measure it lead far apart: what is done
    # with a mass is compared on the same.
    masses = Masses(changes.before[..., None], partials.mass[..., 1])
    asked = ZeroTuning().coefficients(masses, {"gamma": factor[slot]})
    after = asked.statistics["key0_mass_after"] * touched
    torch.testing.assert_close(changes.after, after, atol=1e-6, rtol=1e-4)

    # Here the rest is what is left of the stock output, as in the kernel.
    value = partials.value.clone()
    value[:, :, 1] = stock.float() - value[:, :, 0]
    factors = torch.cat([asked.pools, asked.rest[..., None]], -1)
    expected = stock.clone()
    cpu.combine(expected, case.rows, touched, replace(partials, value=value), factors)
    terms = factors.abs().sum(-1) * 2 * max(v.abs().max() for v in case.values)
    off = (changes.before - partials.mass[..., 0]).abs() + 32 * EPS
    band = (off * (1 + (factor[slot] - 1).abs() * asked.rest) * terms)[..., None]
    band = band + torch.finfo(stock.dtype).eps * expected.float().abs()
    assert torch.equal(output[~touched], stock[~touched])
    assert ((output.float() - expected.float()).abs() <= band).all()


def rescaled(
    case: Problem, pools: list[list[int]], factor: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Outputs for probabilities that are multiplied inside a pool and divided by the new sum.

    A learned sink keeps the share of the row that it had.
    """
    outputs = []
    for request, value in enumerate(case.values):
        p, _ = case.dense(request, dtype)
        changed = p.clone()
        changed[..., pools[request]] *= factor[request][:, None].to(dtype)
        gone = 1 - p.sum(-1, keepdim=True)
        changed = changed / (changed.sum(-1, keepdim=True) + gone)
        outputs.append(reference.attend(changed.to(case.query.dtype).to(dtype), value.to(dtype)))
    return torch.cat(outputs)


@settings(max_examples=120, deadline=None)
@given(pooled(), st.data())
def test_computed_rows_match_the_reference(drawn, data):
    """Some requests from nothing, on all heads; others stay as they are but for chosen heads."""
    case, pools = drawn
    only = [slot[0] for slot in pools]
    count, query_heads, head_dim = case.query.shape
    factors = st.sampled_from([0.1, 0.5, 1.0, 3.0, 10.0])
    factor = torch.tensor([[data.draw(factors) for _ in range(query_heads)] for _ in pools])
    heads = torch.tensor([[data.draw(st.booleans()) for _ in range(query_heads)] for _ in pools])
    computed = torch.tensor([data.draw(st.booleans()) for _ in pools])
    slot, mapped = case.rows.slot.long(), pool_map([[pool] for pool in only])
    stock = torch.randn(count, query_heads, head_dim).to(case.query.dtype)
    output = torch.where(computed[slot][:, None, None], float("nan"), stock)
    corrected, kernels = stock.clone(), attention(case, heads)
    both = Changes.none(count, query_heads), Changes.none(count, query_heads)

    kernels.rescale(output, mapped, factor, computed, both[0])
    kernels.rescale(corrected, mapped, factor, torch.zeros_like(computed), both[1])

    assert torch.equal(output[~computed[slot]], corrected[~computed[slot]])
    assert both[0].finite.all()
    assert torch.equal(both[0].count, both[1].count)
    torch.testing.assert_close(both[0].before, both[1].before, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(both[0].after, both[1].after, atol=1e-6, rtol=1e-4)
    effective = torch.where(heads, factor, 1)
    exact = rescaled(case, only, effective, torch.float64)[computed[slot]]
    rough = rescaled(case, only, effective, torch.float32).to(case.query.dtype)[computed[slot]]
    rounding = torch.finfo(case.query.dtype).eps * exact.abs().max().item() if len(exact) else 0
    if len(exact):
        band = 32 * EPS * max(1.0, exact.abs().max().item())
        budget = 2 * (rough.double() - exact).abs().max().item() + rounding + band
        assert (output[computed[slot]].double() - exact).abs().max().item() <= budget
