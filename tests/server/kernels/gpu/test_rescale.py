"""Rescaling of a pool in Triton, and the combination of partials."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrators import reference
from server.kernels import gpu, gpu_launch
from server.kernels.partials import Partials
from tests.server.kernels.gpu.drawing import LAYOUT, pooled
from tests.server.kernels.gpu.pages import DEVICE, attention, changes
from tests.server.kernels.paging import Problem, problem
from tests.server.kernels.test_cpu import key_zero
from tests.server.kernels.test_properties import EPS, pool_map, rescaled


@pytest.fixture(autouse=True, scope="module")
def short_splits():
    """Rows are split wherever they can be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_launch, "LEAST_CHUNK", 1)
        yield


def masses(case: Problem, pools: list[list[int]]) -> torch.Tensor:
    """float64 `[rows, query_heads]`."""
    return torch.cat([case.dense(r)[0][..., pool].sum(-1) for r, pool in enumerate(pools)])


def log_sum_exps(case: Problem) -> torch.Tensor:
    """Natural, `[query_heads, rows]`, as a stock kernel gives them."""
    heads = torch.ones(len(case.keys), case.query.shape[1], dtype=torch.bool)
    return (attention(case, heads).log_sum_exp / 1.4426950408889634).T.contiguous()


def stock_output(case: Problem) -> torch.Tensor:
    """Attention in float64, rounded once."""
    values = enumerate(case.values)
    whole = [reference.attend(case.dense(r)[0], v.double()) for r, v in values]
    return torch.cat(whole).to(case.query.dtype)


def budget(case: Problem, exact: torch.Tensor, rough: torch.Tensor) -> float:
    """Twice the error of an independent run in low precision, and a band of rounding."""
    rounding = torch.finfo(case.query.dtype).eps * exact.abs().max().item()
    band = 32 * EPS * max(1.0, exact.abs().max().item())
    return 2 * (rough.to(case.query.dtype).double() - exact).abs().max().item() + rounding + band


FACTORS = st.sampled_from([0.1, 0.5, 1.0, 3.0, 10.0])


@settings(max_examples=15)
@given(pooled(), LAYOUT, st.data())
def test_rescaling_matches_the_reference(drawn, layout, data):
    """Some requests from nothing, on all heads; others stay as they are but for chosen heads."""
    case, both = drawn
    only, query_heads = [slot[0] for slot in both], case.query.shape[1]
    factor = torch.tensor([[data.draw(FACTORS) for _ in range(query_heads)] for _ in only])
    heads = torch.tensor([[data.draw(st.booleans()) for _ in range(query_heads)] for _ in only])
    computed, slot = torch.tensor([data.draw(st.booleans()) for _ in only]), case.rows.slot.long()
    stock = torch.randn(case.query.shape).to(case.query.dtype)
    output = torch.where(computed[slot][:, None, None], float("nan"), stock).to(DEVICE)
    done, mapped = changes(len(slot), query_heads), pool_map([[pool] for pool in only])
    attention(case, heads, layout).rescale(output, mapped, factor, computed, done)

    mass, effective = masses(case, only), torch.where(heads, factor, 1)[slot]
    counted = heads[slot] & (mass > 0)
    assert done.finite.all()
    assert torch.equal(done.count.cpu(), counted.int())
    before = torch.where(counted, mass, 0)
    after = effective * before / (1 + (effective - 1) * before)
    torch.testing.assert_close(done.before.cpu().double(), before, atol=4e-6, rtol=0)
    torch.testing.assert_close(done.after.cpu().double(), after, atol=4e-6, rtol=1e-4)
    written = computed[slot][:, None] | (counted & (effective != 1))
    output = output.cpu()
    assert torch.equal(output[~written], stock[~written])
    exact = rescaled(case, only, torch.where(heads, factor, 1), torch.float64)
    rough = rescaled(case, only, torch.where(heads, factor, 1), torch.float32)
    if written.any():
        error = (output.double() - exact)[written].abs().max().item()
        assert error <= budget(case, exact[written], rough[written])


@settings(max_examples=10)
@given(pooled(), LAYOUT, st.data())
def test_correcting_the_stock_output_matches_the_reference(drawn, layout, data):
    """From the stock kernel's log-sum-exps, in one launch."""
    case, both = drawn
    only, query_heads = [slot[0][:20] for slot in both], case.query.shape[1]
    factors = st.sampled_from([0.3, 1.0, 3.0])
    factor = torch.tensor([[data.draw(factors) for _ in range(query_heads)] for _ in only])
    heads = torch.tensor([[data.draw(st.booleans()) for _ in range(query_heads)] for _ in only])
    slot, stock = case.rows.slot.long(), stock_output(case)
    output, done = stock.to(DEVICE, copy=True), changes(len(slot), query_heads)
    none = torch.zeros(len(only), dtype=torch.bool)
    known = attention(case, heads, layout, log_sum_exps(case))
    known.rescale(output, pool_map([[pool] for pool in only]), factor, none, done)

    mass, effective = masses(case, only), torch.where(heads, factor, 1)[slot]
    counted = heads[slot] & (mass > 0)
    assert done.finite.all()
    assert torch.equal(done.count.cpu(), counted.int())
    before = torch.where(counted, mass, 0)
    torch.testing.assert_close(done.before.cpu().double(), before, atol=4e-6, rtol=0)
    output = output.cpu()
    same = ~counted | (effective == 1)
    assert torch.equal(output[same], stock[same])
    exact = rescaled(case, only, torch.where(heads, factor, 1), torch.float64)
    if len(exact):
        # The stock output is rounded before it is divided by `1 + (f - 1) m`.
        rounding = 2 * torch.finfo(stock.dtype).eps * exact.abs().max().item() / 0.3
        assert (output.double() - exact).abs().max().item() <= rounding + 64 * EPS


@pytest.mark.parametrize("stock", [False, True])
def test_a_head_whose_result_is_not_finite_is_reported(stock):
    case = problem([40, 50], [1, 1], block=16)
    known = log_sum_exps(case) if stock else None
    case.query[1, 2] = float("nan")
    heads, half = torch.ones(2, 6, dtype=torch.bool), torch.full((2, 6), 0.5)
    output, done = torch.ones_like(case.query, device=DEVICE), changes(2, 6)
    none = torch.zeros(2, dtype=torch.bool)
    attention(case, heads, stock=known).rescale(output, key_zero(2), half, none, done)
    assert done.finite.tolist() == [True, False]
    assert torch.equal(output[1, 2].cpu(), torch.ones(32))
    assert (output[0] != 1).any(-1).all()
    assert torch.isfinite(output).all()


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize("factor", [float("inf"), float("nan"), 0.0, -1.0])
def test_a_factor_out_of_range_fails_its_row_and_changes_nothing(stock, factor):
    case = problem([40], [1], block=16)
    known = log_sum_exps(case) if stock else None
    heads, none = torch.ones(1, 6, dtype=torch.bool), torch.zeros(1, dtype=torch.bool)
    output, done = torch.ones_like(case.query, device=DEVICE), changes(1, 6)
    measured = attention(case, heads, stock=known)
    measured.rescale(output, key_zero(1), torch.full((1, 6), factor), none, done)
    assert not done.finite.any()
    assert torch.equal(output.cpu(), torch.ones(1, 6, 32))


@pytest.mark.parametrize("columns", [2, 4])
def test_combining_sums_the_columns_of_selected_heads(columns):
    """Two columns are a pool and the rest; four, two pools, a weighted column and the rest."""
    case = problem([9], [3], dtype=torch.bfloat16, block=16)
    heads = torch.rand(3, 6) < 0.5
    pools = columns // 2
    value, factors = torch.randn(3, 6, columns, 32), torch.rand(3, 6, columns)
    neutral = torch.ones(columns)
    neutral[pools:-1] = 0
    factors[0] = neutral
    value[2, 0, 0, 5], heads[2, 0] = float("inf"), True
    output = torch.randn(3, 6, 32).to(torch.bfloat16)
    expected = (value * factors[..., None]).sum(2).to(torch.bfloat16)
    kept = ~heads
    kept[0] = kept[2, 0] = True
    expected[kept] = output[kept]
    partials = Partials(pools, torch.zeros(3, 6, columns), value.to(DEVICE))
    written = output.to(DEVICE, copy=True)
    finite = gpu.combine(written, case.rows, heads.to(DEVICE), partials, factors.to(DEVICE))
    assert finite.tolist() == [True, True, False]
    assert torch.equal(written.cpu()[kept], output[kept])
    torch.testing.assert_close(written.cpu(), expected)


def test_without_pools_heads_are_scaled():
    case = problem([9], [3], block=16)
    output, factors = torch.randn(3, 6, 32), torch.rand(3, 6, 1)
    factors[1, 2] = 1
    every = torch.ones(3, 6, dtype=torch.bool, device=DEVICE)
    nothing = Partials(0, torch.ones(3, 6, 1), torch.empty(3, 6, 0, 32))
    written = output.to(DEVICE, copy=True)
    assert gpu.combine(written, case.rows, every, nothing, factors.to(DEVICE)).all()
    torch.testing.assert_close(written.cpu(), output * factors)
    assert torch.equal(written[1, 2].cpu(), output[1, 2])
