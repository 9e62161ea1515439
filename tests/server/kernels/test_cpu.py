"""The CPU kernels against the dense reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from calibrators import reference
from server.kernels import cpu
from server.kernels.partials import Changes, PoolMap
from tests.server.kernels.paging import WAYS, Problem, attention, measured, problem, stock, values

SHAPES = [
    ([1], [1]),
    ([5], [5]),
    ([32, 33, 64], [1, 1, 1]),
    ([200, 7, 97], [200, 1, 30]),
    ([300] * 8, [1] * 8),
]
GEOMETRIES = [
    {},
    {"soft_cap": 5.0},
    {"window": 20},
    {"alibi": True},
    {"sinks": True},
    {"soft_cap": 3.0, "window": 33, "sinks": True},
]


def key_zero(slots: int) -> PoolMap:
    """One pool, key 0, for each slot."""
    offsets = torch.arange(slots, dtype=torch.int32)[:, None] + torch.tensor([0, 1])
    return PoolMap(torch.zeros(slots, dtype=torch.int32), offsets.int())


def expected(case: Problem, dtype: torch.dtype, gamma: float) -> tuple[torch.Tensor, ...]:
    """Stock output, calibrated output and mass of key 0, all dense."""
    stock, calibrated, mass = [], [], []
    for request, value in enumerate(case.values):
        p, _ = case.dense(request, dtype)
        stock.append(reference.attend(p, value.to(dtype)))
        changed = reference.zerotuning(p, torch.tensor(gamma, dtype=dtype))
        calibrated.append(reference.attend(changed, value.to(dtype)))
        mass.append(p[..., 0])
    return torch.cat(stock), torch.cat(calibrated), torch.cat(mass)


@pytest.mark.parametrize(("lengths", "spans"), SHAPES)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_zerotuning_matches_the_dense_equation(lengths, spans, geometry, dtype, way):
    case = problem(lengths, spans, dtype=dtype, **geometry)
    heads = torch.ones(len(lengths), 6, dtype=torch.bool)
    partials = measured(case, heads, key_zero(len(lengths)), way)
    stock, truth, mass = expected(case, torch.float64, 0.3)
    torch.testing.assert_close(partials.mass[..., 0].double(), mass, atol=2e-6, rtol=2e-5)

    rest = 1 / (1 + (0.3 - 1) * partials.mass[..., :1])
    output = torch.full_like(stock.to(dtype), float("nan"))
    factors = torch.cat([0.3 * rest, rest], -1)
    cpu.combine(output, case.rows, heads[case.rows.slot], partials, factors)
    # Independent low-precision run: the same equation on the rounded stock output.
    rounding = torch.finfo(dtype).eps * truth.abs().max().item()
    budget = 2 * ((stock.to(dtype).double() - stock).abs().max().item() + rounding)
    assert torch.isfinite(output).all()
    assert (output.double() - truth).abs().max().item() <= 2 * budget + 1e-6


@pytest.mark.parametrize("way", WAYS)
def test_unselected_heads_keep_every_bit(way):
    case = problem([40, 50], [40, 1], dtype=torch.bfloat16)
    heads = torch.zeros(2, 6, dtype=torch.bool)
    heads[0, 4] = True
    partials = measured(case, heads, key_zero(2), way)
    assert partials.mass[:, [0, 1, 2, 3, 5]].count_nonzero() == 0
    output = torch.randn(41, 6, 32).to(torch.bfloat16)
    before = output.clone()
    factors = torch.tensor([1.0, 0.5]).expand(41, 6, 2).contiguous()
    cpu.combine(output, case.rows, heads[case.rows.slot], partials, factors)
    changed = (output != before).any(-1)
    assert changed[:40, 4].all()
    assert not changed[40:].any()
    assert not changed[:, [0, 1, 2, 3, 5]].any()


@pytest.mark.parametrize("way", WAYS)
def test_a_window_that_hides_the_key_leaves_no_mass(way):
    case = problem([64], [64], window=16)
    heads = torch.ones(1, 6, dtype=torch.bool)
    partials = measured(case, heads, key_zero(1), way)
    assert partials.mass[:16, :, 0].min() > 0
    assert partials.mass[16:, :, 0].count_nonzero() == 0


@pytest.mark.parametrize("span", [1, 33])
@pytest.mark.parametrize("way", WAYS)
def test_pools_of_many_keys(span, way):
    case = problem([120], [span], kv_heads=3)
    keys = torch.tensor([0, 3, 31, 32, 90, 119], dtype=torch.int32)
    pools = PoolMap(keys, torch.tensor([[0, 2, 2, 6]], dtype=torch.int32))
    heads = torch.ones(1, 6, dtype=torch.bool)
    partials = measured(case, heads, pools, way)
    value = values(case, partials)
    p, _ = case.dense(0)
    groups = [[0, 3], [], [31, 32, 90, 119]]
    for g, members in enumerate(groups):
        pooled = torch.zeros_like(p)
        pooled[..., members] = p[..., members]
        torch.testing.assert_close(
            partials.mass[..., g].double(), pooled.sum(-1), atol=2e-6, rtol=2e-5
        )
        torch.testing.assert_close(
            value[:, :, g].double(),
            reference.attend(pooled, case.values[0].double()),
            atol=5e-6,
            rtol=2e-5,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_the_rest_keeps_its_digits_where_pools_have_nearly_everything(dtype, way):
    """Logits far apart, and for every row its own largest key in the pool."""
    case = problem([150, 60], [150, 1], dtype=dtype)
    case = replace(case, query=case.query * 16)
    tops, rows = [case.dense(r)[0].argmax(-1).unique().int() for r in (0, 1)], slice(0, 150)
    offsets = torch.tensor([[0, len(tops[0])], [len(tops[0]), len(tops[0]) + len(tops[1])]])
    pools = PoolMap(torch.cat(tops), offsets.int())
    found = measured(case, torch.ones(2, 6, dtype=torch.bool), pools, way)

    p = case.dense(0)[0]
    p[..., tops[0].long()] = 0
    exact, value = p.sum(-1), case.values[0].double()
    some = exact > 1e-30
    assert ((exact < 1e-6) & some).sum() > 10
    relative = (found.mass[rows, :, 1] / exact - 1).abs()[some]
    # A logit of 100 in float32 is good for 4e-6 of its probability.
    assert relative.max() < 1e-4
    weights = p / exact[..., None]
    mean, spread = reference.attend(weights, value), reference.attend(weights, value.abs())
    got = values(case, found)[rows, :, 1] / exact[..., None]
    budget = (torch.finfo(dtype).eps / 2 + 1e-4) * spread
    assert ((got - mean).abs() <= budget)[some].all()


# Where value sums are in `results`.
VALUES = 2


def results(case: Problem) -> list[torch.Tensor]:
    """What every kernel makes of a problem."""
    heads = torch.ones(len(case.keys), 6, dtype=torch.bool)
    pools = key_zero(len(case.keys))
    kernels = attention(case, heads)
    partials, kept = kernels.divided(pools), kernels.kept(pools)
    rescaled, combined = torch.ones_like(case.query), torch.ones_like(case.query)
    computed = torch.arange(len(case.keys)) % 2 == 0
    changes = Changes.none(case.query.shape[0], 6)
    kernels.rescale(rescaled, pools, torch.full((len(case.keys), 6), 0.5), computed, changes)
    every = torch.ones(partials.mass.shape[:2], dtype=torch.bool)
    finite = cpu.combine(combined, case.rows, every, partials, partials.mass)
    found = [kernels.log_sum_exp, partials.mass, partials.value, rescaled, combined, finite]
    found += [kept.mass, values(case, kept)]
    return [*found, changes.count, changes.before, changes.after, changes.finite]


@pytest.fixture
def two_threads():
    """The kernels with two threads, where this machine has them."""
    cpu.set_threads(2)
    yield
    cpu.set_threads(1)


def test_threads_change_no_bit(two_threads):
    case = problem([200, 7, 97], [200, 1, 30], dtype=torch.bfloat16)
    parallel = results(case)
    cpu.set_threads(1)
    assert all(torch.equal(one, two) for one, two in zip(parallel, results(case), strict=True))


def test_without_instructions_for_pairs_of_bfloat16(monkeypatch):
    case = problem([200, 7, 97], [200, 1, 30], dtype=torch.bfloat16, block=128)
    native = results(case)
    monkeypatch.setattr(cpu, "PAIRS", False)
    for i, (portable, expected) in enumerate(zip(results(case), native, strict=True)):
        # Outputs are rounded to bfloat16, and so are the probabilities where it is multiplied.
        rounded = portable.dtype == torch.bfloat16 or i == VALUES
        close = 2**-8 if rounded else 1e-5
        torch.testing.assert_close(portable, expected, atol=close, rtol=close)


@pytest.mark.parametrize("computed", [False, True])
def test_a_head_whose_result_is_not_finite_is_reported(computed):
    case = problem([40, 50], [1, 1])
    case.query[1, 2] = float("nan")
    heads, half = torch.ones(2, 6, dtype=torch.bool), torch.full((2, 6), 0.5)
    output, changes = torch.ones_like(case.query), Changes.none(2, 6)
    attention(case, heads).rescale(
        output, key_zero(2), half, torch.tensor([computed, computed]), changes
    )
    assert changes.finite.tolist() == [True, False]
    assert computed or torch.equal(output[1, 2], torch.ones(32))
    assert (output[0] != 1).any(-1).all()
    assert torch.isfinite(output[:, [0, 1, 3, 4, 5]]).all()


def test_a_factor_out_of_range_leaves_computed_attention_as_it_is():
    case = problem([40], [1])
    heads, computed = torch.ones(1, 6, dtype=torch.bool), torch.ones(1, dtype=torch.bool)
    plain, rewritten = torch.empty(1, 6, 32), torch.empty(1, 6, 32)
    for output, factor in ((plain, 1.0), (rewritten, float("inf"))):
        changes = Changes.none(1, 6)
        factors = torch.full((1, 6), factor)
        attention(case, heads).rescale(output, key_zero(1), factors, computed, changes)
    assert not changes.finite.any()
    assert torch.equal(rewritten, plain)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("where", ["query", "value"])
def test_a_row_that_is_not_finite_keeps_its_stock_output(way, where):
    case = problem([40, 50], [1, 1])
    if where == "query":
        case.query[1, 2] = float("nan")
    else:
        # Key 3 of the second request, which lies there value by value.
        page = case.cache.pages[case.cache.block_table[1, 0], 0, 1].view(32, 32)
        page[3] = float("inf")
    bad = [2] if where == "query" else [0, 1, 2]
    heads, output = torch.ones(2, 6, dtype=torch.bool), stock(case).float()
    output[1, bad] = float("nan")
    before = output.clone()
    partials = measured(case, heads, key_zero(2), way)
    halves = torch.full((2, 6, 2), 0.5)
    assert cpu.combine(output, case.rows, heads, partials, halves).tolist() == [True, False]
    good = [h for h in range(6) if h not in bad]
    assert torch.isnan(output[1, bad]).all()
    assert (output[0] != before[0]).any(-1).all()
    assert (output[1, good] != before[1, good]).any(-1).all()


@pytest.mark.parametrize("way", WAYS)
def test_nothing_of_a_row_is_a_number_where_a_logit_is_not(way):
    """Empty pools too: a calibrator must not take them for nothing and pass the row over."""
    case = problem([40], [1])
    case.query[0, 2, 5] = float("nan")
    pools = PoolMap(torch.zeros(1, dtype=torch.int32), torch.tensor([[0, 0, 1]]).int())
    mass = measured(case, torch.ones(1, 6, dtype=torch.bool), pools, way).mass
    assert mass[0, 2].isnan().all()
    assert mass[0, [0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("way", WAYS)
def test_factors_that_change_nothing_keep_every_bit(way):
    case = problem([40, 50], [1, 1])
    heads, output = torch.ones(2, 6, dtype=torch.bool), torch.randn(2, 6, 32)
    before, factors = output.clone(), torch.ones(2, 6, 2)
    factors[0, 1] = factors[1, 4] = 0.5
    partials = measured(case, heads, key_zero(2), way)
    assert cpu.combine(output, case.rows, heads, partials, factors).all()
    changed = (output != before).any(-1)
    assert changed.nonzero().tolist() == [[0, 1], [1, 4]]


def test_values_are_left_to_combine_where_rows_are_single(monkeypatch):
    def kept(case: Problem, pools: PoolMap) -> bool:
        found = attention(case, torch.ones(1, 6, dtype=torch.bool)).pool_partials(pools)
        return isinstance(found, cpu.Kept)

    none = PoolMap(torch.empty(0, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32))
    assert kept(problem([512], [1]), key_zero(1))
    assert kept(problem([512], [2], tile=1), key_zero(1))
    assert not kept(problem([512], [2]), key_zero(1))
    assert not kept(problem([512], [1]), none)
    monkeypatch.setattr(cpu, "MOST_KEPT", 6 * 512 * 4 - 1)
    assert not kept(problem([512], [1]), key_zero(1))
    assert kept(problem([512], [1], window=400), key_zero(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("share", [0.1, 0.9])
def test_the_stock_output_is_corrected_only_where_little_of_it_goes(dtype, share):
    """Key 0 is taken away from rows that it is such a share of."""
    case = problem([60, 60], [1, 1], dtype=dtype, kv_heads=6)
    changed = []
    for request, values_of in enumerate(case.values):
        p = case.dense(request)[0]
        rest = reference.attend(p[..., 1:], values_of[1:].double())[0].norm(dim=-1)
        size = rest * share / (1 - share) / p[0, :, 0]
        value = values_of[0].double()
        values_of[0] = (value * (size / value.norm(dim=-1))[:, None]).to(dtype)
        page = case.cache.pages[case.cache.block_table[request, 0], :, 1]
        page.view(6, 32, 32)[:, 0] = values_of[0]
        factors = torch.full_like(p, 1.1)
        factors[..., 0] = 1e-3
        changed.append(reference.attend(p * factors, values_of.double()))
    truth, heads = torch.cat(changed), torch.ones(2, 6, dtype=torch.bool)
    partials = measured(case, heads, key_zero(2), "kept")
    factors = torch.tensor([1e-3, 1.1]).expand(2, 6, 2).contiguous()
    output, other = stock(case).to(dtype), (stock(case) * 1.05).to(dtype)
    for each in (output, other):
        assert cpu.combine(each, case.rows, heads, partials, factors).all()
    size = truth.abs().amax(-1, keepdim=True)
    assert ((output.double() - truth).abs() <= 3 * torch.finfo(dtype).eps * size + 1e-6).all()
    assert (output != other).any(-1).all() if share < 0.5 else torch.equal(output, other)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_computed_rows_need_no_stock_output(way, dtype):
    """Head 1 is left alone, and head 2 changed by nothing."""
    case = problem([300, 40, 70], [1, 1, 1], dtype=dtype)
    heads, gamma = torch.ones(3, 6, dtype=torch.bool), 0.3
    plain, truth, mass = expected(case, torch.float64, gamma)
    truth[:, 1:3], truth[2] = plain[:, 1:3], plain[2]
    rest = 1 / (1 + (gamma - 1) * mass[..., None].float())
    factors = torch.cat([gamma * rest, rest], -1)
    factors[:, 1], factors[:, 2] = float("nan"), 1
    touched = torch.tensor([1, 0, 1, 1, 1, 1]).bool().repeat(3, 1)
    touched[2] = False
    output = torch.full_like(plain.to(dtype), float("nan"))
    output[1] = plain[1]
    computed, partials = torch.tensor([True, False, True]), measured(case, heads, key_zero(3), way)
    assert cpu.combine(output, case.rows, touched, partials, factors, computed).all()
    assert torch.equal(output[1, 1:3], plain[1, 1:3].to(dtype))
    size = truth.abs().amax(-1, keepdim=True)
    assert ((output.double() - truth).abs() <= 3 * torch.finfo(dtype).eps * size + 1e-6).all()


@pytest.mark.parametrize("way", WAYS)
def test_a_computed_row_that_is_not_finite_is_zero(way):
    """Nobody else reads it, but it may not stay what the memory held before."""
    case = problem([40, 50], [1, 1])
    case.query[1, 2] = float("nan")
    heads, halves = torch.ones(2, 6, dtype=torch.bool), torch.full((2, 6, 2), 0.5)
    output = torch.full((2, 6, 32), float("nan"))
    partials = measured(case, heads, key_zero(2), way)
    finite = cpu.combine(output, case.rows, heads, partials, halves, torch.ones(2).bool())
    assert finite.tolist() == [True, False]
    assert output.isfinite().all()
    assert (output == 0).all(-1).nonzero().tolist() == [[1, 2]]
