import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from calibrators import reference
from calibrators.capabilities import across_heads
from calibrators.gift import GIFT, GIFTSettings
from calibrators.interface import (
    CalibrationError,
    Masses,
    Prefill,
    ProbabilityBlock,
    Prompt,
    Rows,
    Skip,
    Span,
)
from tests.calibrators.dense import among, causal, measured, parameters

METHOD = GIFT()
IMAGES = (Span(2, 5), Span(6, 8))
VISUAL = [2, 3, 4, 6, 7]
# Two words of one and of two tokens; the last token of the prompt is a template's.
PROMPT = Prompt(16, IMAGES, (Span(8, 14),), (Span(9, 10), Span(12, 14)))
CONTENT = [9, 12, 13]
SEEDS = st.integers(0, 2**32 - 1)
HEADS = 6


@pytest.fixture
def facts(make_facts):
    return make_facts(layers=6, modality="vision")


def bind(facts, **fields):
    return METHOD.bind(GIFTSettings.model_validate(fields), facts)


def observe(bound, prompt):
    (block,) = METHOD.observe(bound, prompt)
    return block


def resolve(facts, p, prompt=PROMPT, layer=3, **fields):
    """Plan of a layer from the probabilities `[P, heads, P]` of the saliency layer."""
    bound = bind(facts, **fields)
    block = observe(bound, prompt)
    keys = [j for span in block.keys for j in range(span.start, span.stop)]
    values = p[list(block.rows)][..., keys].transpose(0, 1).float().numpy()
    return METHOD.resolve(bound, layer, facts, prompt, {block: values})


def coefficients(visual, query, enhanced=None, alpha=5.0, beta=1.0):
    """Of one row, from masses of its heads; every image token weighs `enhanced / visual`."""
    plain = torch.tensor([[visual, query]]).movedim(1, 2)
    weighted = torch.tensor(enhanced if enhanced is not None else visual)[None, :, None]
    both = torch.cat([weighted, torch.zeros_like(weighted)], -1)
    given = {"alpha": torch.full_like(plain[..., 0], alpha)}
    given["beta"] = torch.full_like(plain[..., 0], beta)
    return METHOD.coefficients(Masses(plain, 1 - plain.sum(-1), both), given)


def rewritten(p, plan, dtype, rows):
    """What a plan makes of probabilities, and the coefficients that do it."""
    masses, masks = measured(p, plan, dtype)
    result = METHOD.coefficients(masses, parameters(plan, rows, dtype))
    weights = torch.zeros(p.shape[-1], dtype=torch.float64)
    weights[masks[0]] = torch.from_numpy(plan.pools[0].weights).double()
    visual = result.pools[..., 0, None] + result.weighted[..., 0, None] * weights
    factors = [visual.double(), result.pools[..., 1].double()]
    changed = reference.recombine(p, masks, factors, result.rest.double())
    return torch.where(result.apply[..., None], changed, p), result, weights


def test_bind_scales_the_defaults_with_the_depth(facts):
    bound = bind(facts)
    assert bound.params == {
        "alpha": 5.0,
        "beta": 1.0,
        "saliency_layer": 2,
        "layers": [2, 3, 4],
        "defaults": "depth-scaled",
    }
    assert (bound.method, bound.layers, bound.heads, bound.profile) == ("gift", 3, 18, None)


@pytest.mark.parametrize(
    ("layers", "saliency", "chosen"),
    [(1, 0, "all"), (2, 0, "all"), (3, 1, [1, 2]), (30, 10, [*range(10, 21)])],
)
def test_any_depth_has_defaults(make_facts, layers, saliency, chosen):
    bound = bind(make_facts(layers=layers))
    assert (bound.params["saliency_layer"], bound.params["layers"]) == (saliency, chosen)


def test_equal_settings_have_one_form(facts):
    explicit = {"saliency_layer": 2, "layers": [4, 2, 3], "alpha": 5, "beta": 1}
    assert bind(facts, **explicit) == bind(facts)
    own = bind(facts, saliency_layer=5, layers=[0, 1, 2, 3, 4, 5])
    assert own == bind(facts, saliency_layer=5, layers="all")
    assert (own.params["layers"], own.params["defaults"]) == ("all", None)
    assert bind(facts, layers=[1]).params["defaults"] == "depth-scaled"


@pytest.mark.parametrize("field", ["saliency_layer", "layers"])
def test_layers_the_model_has_not_got(facts, field):
    with pytest.raises(CalibrationError, match="the model has 6 layers") as caught:
        bind(facts, **{field: 6 if field == "saliency_layer" else [6]})
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("alpha", [-0.1, 10.1, float("nan"), float("inf"), True, "5"]),
        ("beta", [-0.1, 10.1, float("nan"), True, None]),
        ("saliency_layer", [-1, True, 1.0, "all", [1]]),
        ("layers", ["some", [], [1, 1], [-1]]),
        ("heads", ["all"]),
    ],
)
def test_what_is_out_of_range_is_refused(field, values):
    for value in values:
        with pytest.raises(ValidationError) as caught:
            GIFTSettings.model_validate({field: value})
        assert caught.value.errors()[0]["loc"][0] == field


def test_settings_of_another_method_are_a_mistake_of_the_caller(make_facts, make_calibrator):
    with pytest.raises(TypeError, match="GIFT got Settings"):
        METHOD.bind(make_calibrator().Settings(), make_facts())


def test_rows_from_the_last_of_the_prompt_on(facts):
    bound = bind(facts)
    assert METHOD.prefill(bound) is Prefill.SPLIT_LAST
    assert METHOD.rows(bound, PROMPT) == Rows(first=15)
    assert across_heads(METHOD)


def test_content_rows_and_those_before_are_observed(facts):
    block = observe(bind(facts), PROMPT)
    assert block == ProbabilityBlock(2, (8, 9, 11, 12, 13), IMAGES)
    assert observe(bind(facts, saliency_layer=4), Prompt(0)) == ProbabilityBlock(4, (), ())


def test_neither_the_first_row_nor_the_last_is_a_content_row(facts):
    words = (Span(0, 2), Span(14, 16), Span(15, 16))
    prompt = Prompt(16, IMAGES, (Span(0, 2), Span(14, 16)), words)
    assert observe(bind(facts), prompt).rows == (0, 1, 13, 14)
    plan = resolve(facts, causal(0, 16, HEADS), prompt)
    assert plan.statistics == {"content_words": 2.0}


def test_pools_are_weighted_image_tokens_and_the_question(facts):
    plan = resolve(facts, causal(1, 16, HEADS), alpha=3, beta=0.5)
    visual, query = plan.pools
    assert visual.keys.tolist() == VISUAL
    assert query.keys.tolist() == [*range(8, 14)]
    assert (visual.keys.dtype, query.keys.dtype) == (np.int32, np.int32)
    assert visual.weights.dtype == np.float32
    assert visual.weights.min() == 1
    assert visual.weights.max() == pytest.approx(np.exp(3))
    assert query.weights is None
    assert plan.heads.all()
    assert plan.statistics == {"content_words": 2.0}
    assert {name: set(values) for name, values in plan.parameters.items()} == {
        "alpha": {3.0},
        "beta": {0.5},
    }


def test_other_layers_are_left_alone(facts):
    assert resolve(facts, causal(1, 16, HEADS), layer=5) is None


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        (Prompt(16, (), PROMPT.query, PROMPT.content), "the prompt has no image"),
        (Prompt(16, IMAGES), "no content word"),
        (Prompt(16, IMAGES, PROMPT.query), "no content word"),
        (Prompt(16, IMAGES, PROMPT.query, (Span(15, 16),)), "no content word"),
        (Prompt(16, (Span(2, 3),), PROMPT.query, PROMPT.content), "no image token is more"),
        (Prompt(16, (Span(10, 14),), (Span(2, 9),), (Span(3, 5),)), "no image token is more"),
    ],
)
def test_declared_skips(facts, prompt, reason):
    skip = resolve(facts, causal(0, 16, HEADS), prompt)
    assert isinstance(skip, Skip)
    assert reason in skip.reason
    assert skip.plan is None


def test_a_map_that_is_the_same_everywhere_is_a_skip(facts):
    even = torch.full((16, HEADS, 16), 1 / 16)
    assert isinstance(resolve(facts, even), Skip)


def test_saliency_of_a_growing_gaze(facts):
    """Three heads of six are looked at; the map is the mean of what they gain."""
    p = torch.zeros(16, HEADS, 16)
    p[9, 0, 3] = 0.5
    p[9, 1, 4] = 0.25
    p[12, 2, 6] = 0.25
    p[8, 3, 2] = 0.9  # not a content row, and a loss in the next
    p[12, 4, 7] = 0.2  # a fourth head
    weights = resolve(facts, p, alpha=2).pools[0].weights
    np.testing.assert_allclose(np.log(weights) / 2, [0, 1, 0.5, 0.5, 0], atol=1e-6)


def test_an_outlier_of_the_map_is_clipped(facts):
    prompt = Prompt(42, (Span(1, 38),), (Span(38, 41),), (Span(40, 41),))
    p = torch.zeros(42, HEADS, 42)
    p[40, :3, 2], p[40, :3, 3] = 0.5, 0.25
    gaze = np.zeros(37)
    gaze[1:3] = 0.5, 0.25
    top = gaze.mean() + 3 * gaze.std(ddof=1)
    assert 0.25 < top < 0.5
    weights = resolve(facts, p, prompt, alpha=1).pools[0].weights
    np.testing.assert_allclose(np.log(weights[:3]), [0, 1, 0.25 / top], atol=1e-6)


def test_heads_that_gain_alike_rank_by_their_index(facts):
    p = torch.zeros(16, HEADS, 16)
    for head, key in enumerate([2, 2, 3, 4, 6, 7]):
        p[9, head, key] = 0.5
    weights = resolve(facts, p, alpha=1).pools[0].weights
    np.testing.assert_allclose(np.log(weights), [1, 0.5, 0, 0, 0], atol=1e-6)


@given(SEEDS, st.floats(0, 10), st.integers(1, 7))
def test_the_map_is_the_reference(make_facts, seed, alpha, heads):
    facts = make_facts(layers=6, query_heads=heads, kv_heads=1)
    p = causal(seed, 16, heads, spread=3)
    plan = resolve(facts, p, alpha=alpha)
    saliency = reference.gift_saliency(p, CONTENT, among(VISUAL, 16))
    if saliency is None:  # one head alone may look away at every word
        assert isinstance(plan, Skip)
        return
    expected = torch.exp(np.float32(alpha) * saliency)
    found = torch.from_numpy(plan.pools[0].weights).double()
    torch.testing.assert_close(found, expected, atol=0, rtol=1e-3)


@given(
    SEEDS, st.floats(0, 10, width=32), st.floats(0, 4, width=32), st.integers(1, 7), st.booleans()
)
def test_a_layer_is_the_reference(make_facts, seed, alpha, beta, heads, double):
    facts = make_facts(layers=6, query_heads=heads, kv_heads=1)
    plan = resolve(facts, causal(seed, 16, heads), alpha=alpha, beta=beta)
    assume(not isinstance(plan, Skip))
    rows = [15, 16, 17]
    p = causal(seed ^ 1, 18, heads)[rows]
    images, query = among(VISUAL, 18), among([*range(8, 14)], 18)
    dtype = torch.float64 if double else torch.float32
    result, found, weights = rewritten(p, plan, dtype, len(rows))
    assume(_told_apart(p[..., images].sum(-1)) and _told_apart(p[..., query].sum(-1)))
    truth = reference.gift(p, images, weights, query, beta)
    torch.testing.assert_close(result, truth, atol=2e-6, rtol=2e-5)
    torch.testing.assert_close(result.sum(-1), torch.ones_like(p[..., 0]), atol=1e-5, rtol=0)
    after = result[..., images].sum(-1).to(dtype)
    torch.testing.assert_close(found.statistics["visual_mass_after"], after, atol=1e-5, rtol=0)
    assert found.apply.all()


def _told_apart(mass):
    """Whether heads rank the same in float32."""
    ranked = mass.sort(-1).values
    return bool((ranked.diff(dim=-1) > 1e-6).all())


def test_halves_of_heads():
    visual, query = [0.1, 0.4, 0.3, 0.2], [0.2, 0.1, 0.1, 0.3]
    enhanced = [0.5, 1.2, 0.9, 0.2]
    result = coefficients(visual, query, enhanced, beta=0.5)
    r = 0.5 * (1.2 + 0.9) / (0.4 + 0.3)
    total = torch.tensor([[1 + (r - 1) * 0.2, 1.8, 1.6, 1 + (r - 1) * 0.3]])
    torch.testing.assert_close(result.rest, 1 / total)
    torch.testing.assert_close(
        result.weighted[..., 0] * total, torch.tensor([[0.0, 1.0, 1.0, 0.0]])
    )
    torch.testing.assert_close(result.pools[..., 0] * total, torch.tensor([[1.0, 0, 0, 1]]))
    torch.testing.assert_close(result.pools[..., 1] * total, torch.tensor([[r, 1, 1, r]]))
    assert not result.weighted[..., 1].any()
    torch.testing.assert_close(result.statistics["mean_r"], torch.full((1, 4), r))
    after = torch.tensor([[0.1, 1.2, 0.9, 0.2]]) / total
    torch.testing.assert_close(result.statistics["visual_mass_after"], after)


def test_heads_of_neither_half_keep_every_bit():
    result = coefficients([0.1, 0.3, 0.2, 0.1], [0.3, 0.2, 0.1, 0.1], [0.2, 0.9, 0.6, 0.1])
    assert result.rest[0, 3] == 1
    assert result.pools[0, 3].tolist() == [1, 1]
    assert result.weighted[0, 3].tolist() == [0, 0]


def test_alike_heads_rank_by_their_index():
    result = coefficients([0.25] * 5, [0.25] * 5, [0.5] * 5)
    assert (result.weighted[0, :, 0] > 0).tolist() == [True, True, False, False, False]
    assert (result.pools[0, :, 1] > result.rest[0]).tolist() == [True, True, False, False, False]


def test_a_row_that_sees_no_image_stays_as_it_is():
    result = coefficients([0.0] * 4, [0.3, 0.2, 0.1, 0.4])
    assert not result.apply.any()
    assert result.eligible.all()


def test_a_head_that_would_be_left_with_nothing_stays_as_it_is():
    result = coefficients([0.0, 0.5, 0.4, 0.2], [1.0, 0.5, 0.2, 0.3], [0, 1, 1, 1], beta=0.0)
    assert result.apply.tolist() == [[False, True, True, True]]
    assert torch.isfinite(result.rest).all()


@given(st.lists(st.tuples(*[st.floats(0, 0.5, width=32)] * 2), min_size=1, max_size=9))
def test_alpha_0_with_beta_1_is_exactly_nothing(pairs):
    visual, query = map(list, zip(*pairs, strict=True))
    result = coefficients(visual, query, alpha=0.0)
    assert (result.rest == 1).all()
    assert (result.pools == 1).all()
    assert (result.weighted == 0).all()
    assert (result.statistics["mean_r"] == 1).all()


@given(
    st.lists(st.tuples(*[st.floats(0, 1, width=32)] * 3, st.floats(0, 10)), min_size=1, max_size=9),
    st.floats(0, 10),
    st.floats(0, 10),
)
def test_whatever_the_masses_the_result_is_finite(heads, alpha, beta):
    plain = torch.tensor([[each[:2] for each in heads]])
    rest = torch.tensor([[each[2] for each in heads]])
    weight = torch.tensor([[each[3] for each in heads]]).exp()
    weighted = torch.stack([plain[..., 0] * weight, torch.zeros_like(rest)], -1)
    given = {"alpha": torch.full_like(rest, alpha), "beta": torch.full_like(rest, beta)}
    result = METHOD.coefficients(Masses(plain, rest, weighted), given)
    tensors = result.rest, result.pools, result.weighted, *result.statistics.values()
    for tensor in tensors:
        assert torch.isfinite(tensor).all()


def test_a_mass_that_is_no_number_shows():
    result = coefficients([float("nan"), 0.1, 0.2, 0.3], [0.1] * 4)
    assert result.apply[0, 0]
    assert not torch.isfinite(result.rest).all()
