"""The pool algebra expresses all five methods.

Each method is written twice: densely and row by row, as its paper has it, and as coefficients
that see nothing but masses, those of VAR, GIFT and VHR being the methods' own. Both the
probabilities that `reference.recombine` gives and the outputs of the formula in
`calibrators.interface` must agree with the former.
"""

from dataclasses import replace

import pytest
import torch

from calibrators import reference
from calibrators.gift import GIFT
from calibrators.interface import Coefficients, Masses
from calibrators.var import VAR
from calibrators.vhr import VHR

PROMPT, LENGTH, HEADS, DIM = 12, 16, 6, 4
IMAGE = range(2, 7)
QUERY = range(8, 11)
SINKS = (0, 3, 5, 9)


@pytest.fixture(params=range(3))
def probability(request):
    """`[rows, heads, keys]`, causal; every position is a row."""
    generator = torch.Generator().manual_seed(request.param)
    score = 2 * torch.randn(LENGTH, HEADS, LENGTH, generator=generator, dtype=torch.float64)
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    return score.masked_fill(hidden[:, None], float("-inf")).softmax(-1)


def keys(*positions):
    pool = torch.zeros(LENGTH, dtype=torch.bool)
    pool[list(positions)] = True
    return pool


def masses(p, pools, weights=None):
    """What the engine measures."""
    plain = [(p * pool).sum(-1) for pool in pools]
    weighted = None
    if weights is not None:
        weighted = torch.stack([(p * pool * weights).sum(-1) for pool in pools], -1)
    empty = p.new_zeros(*p.shape[:2], 0)
    stacked = torch.stack(plain, -1) if plain else empty
    return Masses(stacked, 1 - stacked.sum(-1), weighted)


def assert_expresses(p, dense, pools, result, weights=None):
    """Compare with the dense result, on probabilities and through the formula on outputs."""
    applied = torch.ones(p.shape[:2], dtype=torch.bool) if result.apply is None else result.apply
    scale = torch.ones_like(result.rest) if result.scale is None else result.scale
    factors = [_per_key(result, g, weights) for g in range(len(pools))]
    rewritten = reference.recombine(p, pools, factors, result.rest) * scale[..., None]
    rewritten = torch.where(applied[..., None], rewritten, p)
    torch.testing.assert_close(rewritten, dense, atol=1e-12, rtol=0)

    value = torch.randn(LENGTH, HEADS, DIM, dtype=torch.float64)
    corrected = _formula(p, value, pools, result, weights)
    stock = reference.attend(p, value)
    output = torch.where(applied[..., None], corrected, stock)
    torch.testing.assert_close(output, reference.attend(dense, value), atol=1e-12, rtol=0)


def _per_key(result, g, weights):
    if result.weighted is None:
        return result.pools[..., g]
    return result.pools[..., g, None] + result.weighted[..., g, None] * weights


def _formula(p, value, pools, result, weights):
    """The formula at the head of `calibrators.interface`."""
    partial = [reference.attend(p * pool, value) for pool in pools]
    output = reference.attend(p, value)
    if partial:
        output = output - sum(partial)
    output = result.rest[..., None] * output
    for g, each in enumerate(partial):
        output = output + result.pools[..., g, None] * each
        if result.weighted is not None:
            weighted = reference.attend(p * pools[g] * weights, value)
            output = output + result.weighted[..., g, None] * weighted
    return output if result.scale is None else output * result.scale[..., None]


def every(p):
    """(row, head) pairs."""
    return [(i, h) for i in range(p.shape[0]) for h in range(p.shape[1])]


@pytest.mark.parametrize("gamma", [0.3, 1.0, 4.0])
def test_zerotuning(probability, gamma):
    dense = probability.clone()
    for i, h in every(probability):
        total = 1 + (gamma - 1) * probability[i, h, 0]
        dense[i, h, 0] = gamma * probability[i, h, 0] / total
        dense[i, h, 1:] = probability[i, h, 1:] / total

    pools = [keys(0)]
    total = 1 + (gamma - 1) * masses(probability, pools).plain
    result = Coefficients(rest=1 / total[..., 0], pools=gamma / total)
    assert_expresses(probability, dense, pools, result)


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_act_with_sinks_of_each_head(probability, beta):
    seen = probability[:PROMPT, :, :PROMPT].sum(0)
    means = seen / (PROMPT - torch.arange(PROMPT))
    sinks = torch.zeros(HEADS, LENGTH, dtype=torch.bool)
    sinks[:, 1:PROMPT] = means[:, 1:] > 1.2 / PROMPT
    assert len({tuple(head) for head in sinks.tolist()}) > 1

    dense = probability.clone()
    for i, h in every(probability):
        row, sink = probability[i, h], sinks[h]
        mass = row[sink].sum()
        if mass == 0 or 1 - mass < 1e-6:
            continue
        dense[i, h] = torch.where(sink, beta * row, row * (1 - beta * mass) / (1 - mass))

    mass = masses(probability, [sinks]).plain[..., 0]
    result = Coefficients(
        rest=(1 - beta * mass) / (1 - mass),
        pools=torch.full_like(mass, beta)[..., None],
        apply=(mass > 0) & (1 - mass >= 1e-6),
    )
    assert_expresses(probability, dense, [sinks], result)
    assert (dense != probability).any()


def var_row(row, i, share, rho, min_visual_mass):
    """One row of VAR, written from its equations."""
    image = [j for j in IMAGE if j <= i]
    visual_sinks = [j for j in SINKS if j in IMAGE and j <= i]
    text_sinks = [j for j in SINKS if j not in IMAGE and j <= i]
    m_vis, a_v, a_t = (row[each].sum() for each in (image, visual_sinks, text_sinks))
    rest = m_vis - a_v
    if m_vis < min_visual_mass or 1 - a_v / m_vis < rho or rest <= 0:
        return row, False
    changed = row.clone()
    for j in range(i + 1):
        if j in SINKS:
            changed[j] = (1 - share) * row[j]
        elif j in IMAGE:
            changed[j] = row[j] * (1 + share * (a_v + a_t) / rest)
    return changed, True


def test_var(probability):
    share, rho, least = 0.6, 0.5, 0.2
    rows = range(IMAGE.stop, LENGTH)
    dense = probability.clone()
    chosen = 0
    for i, h in every(probability):
        if i in rows:
            dense[i, h], selected = var_row(probability[i, h], i, share, rho, least)
            chosen += selected
    assert 0 < chosen < len(rows) * HEADS

    visual = [j for j in SINKS if j in IMAGE]
    text = [j for j in SINKS if j not in IMAGE]
    pools = [keys(*visual), keys(*text), keys(*(j for j in IMAGE if j not in SINKS))]
    given = {"share": share, "rho": rho, "min_visual_mass": least}
    result = coefficients(VAR(), masses(probability, pools), given)
    calibrated_rows = torch.zeros(LENGTH, 1, dtype=torch.bool)
    calibrated_rows[list(rows)] = True
    result = replace(result, apply=result.apply & calibrated_rows)
    assert_expresses(probability, dense, pools, result)


def coefficients(method, measured, given):
    """Of a method, with the same parameters on all rows and heads."""
    parameters = {name: torch.full_like(measured.rest, value) for name, value in given.items()}
    return method.coefficients(measured, parameters)


def top_half(values):
    """Heads with the greatest values; ties go to the lower index."""
    return sorted(range(HEADS), key=lambda h: (-float(values[h]), h))[: HEADS // 2]


def test_gift(probability):
    beta = 0.8
    saliency = torch.linspace(0, 1, len(IMAGE), dtype=torch.float64)
    weights = torch.zeros(LENGTH, dtype=torch.float64)
    weights[list(IMAGE)] = torch.exp(2.5 * saliency)

    dense = probability.clone()
    for i in range(PROMPT - 1, LENGTH):
        row = probability[i]
        visual, query = row[:, list(IMAGE)].sum(-1), row[:, list(QUERY)].sum(-1)
        enhanced = (row * weights).sum(-1)
        visual_heads, query_heads = top_half(visual), top_half(query)
        r = beta * enhanced[visual_heads].sum() / visual[visual_heads].sum()
        for h in range(HEADS):
            for j in range(i + 1):
                if h in visual_heads and j in IMAGE:
                    dense[i, h, j] = row[h, j] * weights[j]
                if h in query_heads and j in QUERY:
                    dense[i, h, j] = row[h, j] * r
            dense[i, h] /= dense[i, h].sum()

    pools = [keys(*IMAGE), keys(*QUERY)]
    measured = masses(probability, pools, weights)
    result = coefficients(GIFT(), measured, {"alpha": 2.5, "beta": beta})
    rows = torch.arange(LENGTH)[:, None] >= PROMPT - 1
    result = replace(result, apply=result.apply & rows)
    assert_expresses(probability, dense, pools, result, weights)


def test_vhr_scales_heads_and_nothing_else(probability):
    chosen = torch.tensor([True, False, False, True, True, False])
    dense = probability * torch.where(chosen, 2.0, 1.0).double()[:, None]
    measured = masses(probability, [])
    assert measured.plain.shape == (LENGTH, HEADS, 0)
    result = coefficients(VHR(), measured, {"alpha": 2.0})
    result = replace(result, apply=chosen.expand(LENGTH, HEADS))
    assert_expresses(probability, dense, [], result)


def test_weights_first_head_scale_last(probability):
    gamma, scale = 0.5, torch.linspace(0.5, 2, HEADS, dtype=torch.float64).expand(LENGTH, HEADS)
    dense = reference.zerotuning(probability, torch.tensor(gamma)) * scale[..., None]
    pools = [keys(0)]
    total = 1 + (gamma - 1) * masses(probability, pools).plain
    result = Coefficients(1 / total[..., 0], gamma / total, scale=scale)
    assert_expresses(probability, dense, pools, result)
