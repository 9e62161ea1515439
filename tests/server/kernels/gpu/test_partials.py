"""Pool partials in Triton against the dense reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrators import reference
from server.kernels import gpu_launch
from server.kernels.partials import PoolMap, PoolTable
from tests.server.kernels.gpu.drawing import LAYOUT, pooled, problems
from tests.server.kernels.gpu.pages import DEVICE, attention
from tests.server.kernels.paging import problem
from tests.server.kernels.test_pool_tables import assert_matches, tables
from tests.server.kernels.test_properties import dense, pool_map, weight_rounding, within


@pytest.fixture(autouse=True, scope="module")
def short_splits():
    """Rows are split wherever they can be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_launch, "LEAST_CHUNK", 1)
        yield


@settings(max_examples=10)
@given(pooled(), LAYOUT)
def test_partials_match_the_reference(drawn, layout):
    case, pools = drawn
    heads = torch.ones(len(pools), case.query.shape[1], dtype=torch.bool)
    got = attention(case, heads, layout).pool_partials(pool_map(pools))
    rough, exact = dense(case, pools, torch.float32), dense(case, pools, torch.float64)
    assert torch.isfinite(got.mass).all() and torch.isfinite(got.value).all()
    assert within(got.mass.cpu(), rough[0], exact[0])
    assert within(got.value.cpu(), rough[1], exact[1], weight_rounding(case))


@settings(max_examples=10)
@given(tables(problems()), LAYOUT)
def test_tables_match_the_reference(drawn, layout):
    case, _, table = drawn
    heads = torch.ones(len(case.keys), case.query.shape[1], dtype=torch.bool)
    got = attention(case, heads, layout).pool_partials(table)
    on_host = replace(got, mass=got.mass.cpu(), value=got.value.cpu())
    assert_matches(on_host, drawn, pools_rounding=weight_rounding(case))


@settings(max_examples=6)
@given(problems(), st.data())
def test_weights_are_a_column_beside_their_pool(case, data):
    """Any finite weight, of either sign and 0."""
    slots, query_heads = len(case.keys), case.query.shape[1]
    keys = [list(range(0, len(key), 3)) for key in case.keys]
    table = PoolTable.of(pool_map([[each] for each in keys]), query_heads)
    count = sum(map(len, keys))
    weight = st.sampled_from([0.0, 1.0, -2.0, 0.3, 1e-3])
    weights = torch.tensor(data.draw(st.lists(weight, min_size=count, max_size=count)))
    heads = torch.ones(slots, query_heads, dtype=torch.bool)
    got = attention(case, heads).pool_partials(replace(table, weights=weights))
    parts, start = {dtype: [] for dtype in (torch.float32, torch.float64)}, 0
    for dtype, found in parts.items():
        start = 0
        for request, listed in enumerate(keys):
            p, value = case.dense(request, dtype)[0], case.values[request].to(dtype)
            w = torch.zeros_like(p)
            w[..., listed] = p[..., listed] * weights[start : start + len(listed)].to(dtype)
            start += len(listed)
            found.append((w.sum(-1), reference.attend(w, value)))
    rough, exact = (
        [torch.cat(each) for each in zip(*found, strict=True)] for found in parts.values()
    )
    assert got.mass.shape[2] == 3
    assert within(got.mass[..., 1].cpu(), rough[0], exact[0])
    assert within(got.value[:, :, 1].cpu(), rough[1], exact[1], 2 * weight_rounding(case))


def test_only_selected_heads_are_measured():
    case = problem([40, 50], [3, 1], dtype=torch.bfloat16, block=16)
    heads = torch.zeros(2, 6, dtype=torch.bool)
    heads[0, 4] = True
    partials = attention(case, heads).pool_partials(pool_map([[[0]], [[0]]]))
    assert partials.mass[:3, 4].count_nonzero() == 6
    partials.mass[:3, 4] = partials.value[:3, 4] = 0
    assert partials.mass.count_nonzero() == 0 and partials.value.count_nonzero() == 0


def test_a_layer_copies_its_geometry_to_the_device_once(monkeypatch):
    """Another layer of the same geometry has one of its own."""
    case, made = problem([40], [1], block=16, sinks=True), []
    find = gpu_launch._or_something
    monkeypatch.setattr(
        gpu_launch, "_or_something", lambda *args: made.append(args[0]) or find(*args)
    )
    heads = torch.ones(1, 6, dtype=torch.bool)
    first = attention(case, heads)
    again = attention(case, heads)
    assert len(made) == 2 and torch.equal(made[1], case.geometry.sinks)
    assert again._model is first._model
    other = attention(replace(case, geometry=replace(case.geometry, sinks=torch.zeros(6))), heads)
    assert len(made) == 4
    assert not torch.equal(other.log_sum_exp, first.log_sum_exp)


def test_rows_that_stand_for_nothing_are_left_alone():
    case = problem([40, 50], [3, 1], block=16)
    token = case.rows.token.clone()
    token[1] = -1
    case = replace(case, rows=replace(case.rows, token=token))
    heads = torch.ones(2, 6, dtype=torch.bool)
    mass = attention(case, heads).pool_partials(pool_map([[[0]], [[0]]])).mass
    assert mass[1].count_nonzero() == 0
    assert (mass[[0, 2, 3]] > 0).all()


def test_a_log_sum_exp_counts_sinks_and_may_come_from_the_stock_kernel():
    case = problem([70, 9], [2, 1], sinks=True, block=16)
    heads = torch.ones(2, 6, dtype=torch.bool)
    own = attention(case, heads).log_sum_exp
    logs = []
    for request in (0, 1):
        span, length = case.spans[request], len(case.keys[request])
        start = sum(case.spans[:request])
        rows = case.query[start : start + span].double()
        geometry = reference.Geometry(case.geometry.scale)
        positions = torch.arange(length - span, length)
        score = reference.logits(rows, case.keys[request].double(), positions, geometry)
        sinks = replace(geometry, sinks=case.geometry.sinks)
        logs.append(reference.log_sum_exp(score, sinks))
    natural = torch.cat(logs)
    torch.testing.assert_close(own.cpu().double() / 1.4426950408889634, natural, atol=1e-5, rtol=0)
    given = attention(case, heads, stock=natural.T.float().contiguous()).log_sum_exp
    torch.testing.assert_close(own, given, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_rest_keeps_its_digits_where_pools_have_nearly_everything(dtype):
    """Logits far apart, and for every row its own largest key in the pool."""
    case = problem([90], [6], dtype=dtype, block=16)
    case = replace(case, query=case.query * 16)
    p = case.dense(0)[0]
    tops = p.argmax(-1).unique().int()
    pools = PoolMap(tops, torch.tensor([[0, len(tops)]], dtype=torch.int32))
    found = attention(case, torch.ones(1, 6, dtype=torch.bool)).pool_partials(pools)
    p[..., tops.long()] = 0
    exact, value = p.sum(-1), case.values[0].double()
    some = exact > 1e-30
    assert (exact[some] < 1e-7).any()
    assert (found.mass[..., 1].cpu() / exact - 1).abs()[some].max() < 1e-4
    weights = p / exact[..., None]
    mean, spread = reference.attend(weights, value), reference.attend(weights, value.abs())
    measured = found.value[:, :, 1].cpu() / exact[..., None]
    budget = (torch.finfo(dtype).eps / 2 + 1e-4) * spread
    assert ((measured - mean).abs() <= budget)[some].all()


def test_nothing_is_read_of_a_type_or_an_order_that_kernels_do_not_know():
    case = problem([5], [1], block=16)
    heads = torch.ones(1, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match="queries are"):
        attention(replace(case, query=case.query.double()), heads)
    wide = torch.zeros(1, 6, 64, device=DEVICE)[..., ::2]
    with pytest.raises(ValueError, match="strides"):
        attention(replace(case, query=wide), heads)
