import math

import pytest
import torch

from calibrators import reference
from calibrators.reference import Geometry

KEYS, HEADS, KV_HEADS, DIM = 24, 6, 2, 16
GEOMETRIES = [
    Geometry(0.25),
    Geometry(0.25, window=5),
    Geometry(0.25, soft_cap=0.7),
    Geometry(0.25, alibi_slopes=torch.linspace(0.05, 0.8, HEADS)),
    Geometry(0.25, sinks=torch.linspace(-1, 2, HEADS)),
    Geometry(
        0.5,
        soft_cap=2.0,
        window=7,
        alibi_slopes=torch.linspace(0.05, 0.8, HEADS),
        sinks=torch.linspace(-1, 2, HEADS),
    ),
]


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return normal(KEYS, HEADS, DIM), normal(KEYS, KV_HEADS, DIM), normal(KEYS, KV_HEADS, DIM)


def one_probability(query, key, row, head, geometry):
    """A row's probabilities in plain Python, by key."""
    weights = {}
    for j in range(row + 1):
        if geometry.window is not None and j <= row - geometry.window:
            continue
        group = HEADS // KV_HEADS
        score = geometry.scale * float(query[row, head] @ key[j, head // group])
        if geometry.soft_cap:
            score = geometry.soft_cap * math.tanh(score / geometry.soft_cap)
        if geometry.alibi_slopes is not None:
            score += float(geometry.alibi_slopes[head]) * (j - row)
        weights[j] = math.exp(score)
    total = sum(weights.values())
    if geometry.sinks is not None:
        total += math.exp(geometry.sinks[head])
    return [weights.get(j, 0.0) / total for j in range(KEYS)]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=range(len(GEOMETRIES)))
def test_probabilities_are_the_softmax_written_out(tensors, geometry):
    query, key, _ = tensors
    found = reference.probabilities(query, key, torch.arange(KEYS), geometry)
    for row in (0, 1, 11, KEYS - 1):
        for head in range(HEADS):
            expected = one_probability(query, key, row, head, geometry)
            torch.testing.assert_close(
                found[row, head], torch.tensor(expected, dtype=torch.float64)
            )


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=range(len(GEOMETRIES)))
def test_rows_sum_to_one_but_for_learned_sinks(tensors, geometry):
    query, key, _ = tensors
    positions = torch.arange(KEYS)
    total = reference.probabilities(query, key, positions, geometry).sum(-1)
    if geometry.sinks is None:
        expected = torch.ones_like(total)
    else:
        score = reference.logits(query, key, positions, geometry)
        sink = torch.exp(geometry.sinks.double() - reference.log_sum_exp(score, geometry))
        expected = 1 - sink
        assert (sink > 0.001).all()
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("window", [None, 1, 5])
def test_outputs_agree_with_torch(tensors, window):
    query, key, value = tensors
    positions = torch.arange(KEYS)
    found = reference.attend(
        reference.probabilities(query, key, positions, Geometry(0.3, window=window)), value
    )
    visible = torch.ones(KEYS, KEYS, dtype=torch.bool).tril()
    if window is not None:
        visible = visible.triu(1 - window)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (query, key, value)),
        attn_mask=visible,
        scale=0.3,
        enable_gqa=True,
    )
    torch.testing.assert_close(found, expected[0].transpose(0, 1))


def test_rows_are_placed_by_their_position(tensors):
    query, key, _ = tensors
    geometry = Geometry(0.25, window=6, alibi_slopes=torch.full((HEADS,), 0.1))
    whole = reference.probabilities(query, key, torch.arange(KEYS), geometry)
    some = torch.tensor([17, 3])
    torch.testing.assert_close(
        reference.probabilities(query[some], key, some, geometry), whole[some]
    )


def test_zerotuning_is_a_bias_on_the_logit_of_key_0(tensors):
    query, key, _ = tensors
    geometry = Geometry(0.25)
    gamma = torch.linspace(0.2, 3, HEADS, dtype=torch.float64)
    score = reference.logits(query, key, torch.arange(KEYS), geometry)
    biased = score.clone()
    biased[..., 0] += gamma.log()
    found = reference.zerotuning(score.softmax(-1), gamma)
    torch.testing.assert_close(found, biased.softmax(-1))
    torch.testing.assert_close(found[0], score[0].softmax(-1))


def test_recombine_scales_pools_and_rest():
    p = torch.full((2, 1, 4), 0.25)
    pools = [torch.tensor([True, False, False, False]), torch.tensor([False, True, True, False])]
    per_key = torch.tensor([0.0, 3.0, 5.0, 0.0]).expand(2, 1, 4)
    found = reference.recombine(p, pools, [torch.full((2, 1), 2.0), per_key], torch.ones(2, 1))
    assert found[0, 0].tolist() == [0.5, 0.75, 1.25, 0.25]


def test_recombine_wants_a_factor_for_each_pool():
    p = torch.full((1, 1, 2), 0.5)
    with pytest.raises(ValueError, match="zip"):
        reference.recombine(p, [torch.tensor([True, False])], [], torch.ones(1, 1))


def test_column_means_are_over_the_rows_that_see_the_key(tensors):
    query, key, _ = tensors
    p = reference.probabilities(query, key, torch.arange(KEYS), Geometry(0.25))
    means = reference.column_means(p)
    for head, j in ((0, 0), (3, 7), (5, KEYS - 1)):
        column = [float(p[row, head, j]) for row in range(j, KEYS)]
        assert float(means[head, j]) == pytest.approx(sum(column) / len(column))


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_act_scales_sinks_and_keeps_the_mass(tensors, beta):
    query, key, _ = tensors
    p = reference.probabilities(query, key, torch.arange(KEYS), Geometry(0.25))
    sinks = torch.zeros(HEADS, KEYS, dtype=torch.bool)
    sinks[:, [3, 9]] = True
    changed = reference.act(p, sinks, torch.tensor(beta).double())
    assert torch.equal(changed[:3], p[:3])
    torch.testing.assert_close(changed[..., [3, 9]], beta * p[..., [3, 9]])
    torch.testing.assert_close(changed.sum(-1), p.sum(-1))
    torch.testing.assert_close(changed[9:, :, 1] / changed[9:, :, 2], p[9:, :, 1] / p[9:, :, 2])
    if beta == 1:
        torch.testing.assert_close(changed, p)


def test_act_leaves_rows_of_sinks_alone():
    p = torch.tensor([[[0.0, 1.0, 0.0]], [[1e-7, 0.5, 0.5]]]).double()
    sinks = torch.tensor([False, True, True])
    assert torch.equal(reference.act(p, sinks, torch.tensor(0.4).double()), p)
