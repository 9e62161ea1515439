import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from calibrators import reference
from calibrators.capabilities import across_heads, chooses_heads
from calibrators.interface import (
    CalibrationError,
    HeadOutputs,
    Masses,
    Prefill,
    Prompt,
    Rows,
    Span,
)
from calibrators.vhr import VHR, VHRSettings

METHOD = VHR()
PROMPT = Prompt(length=10, images=(Span(2, 6),))
SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture
def facts(make_facts):
    return make_facts(layers=16, modality="vision")


def bind(facts, **fields):
    return METHOD.bind(VHRSettings.model_validate(fields), facts)


def resolve(facts, with_images, without_images, layer=1, **fields):
    """Plan of a layer from head outputs `[heads, head_dim]`."""
    observed = {
        HeadOutputs(layer): np.asarray(with_images, np.float32),
        HeadOutputs(layer, without_images=True): np.asarray(without_images, np.float32),
    }
    return METHOD.resolve(bind(facts, **fields), layer, facts, PROMPT, observed)


def chosen(facts, with_images, without_images):
    return resolve(facts, with_images, without_images).details["heads_selected"]


def test_bind_resolves_the_defaults_for_the_model(facts):
    bound = bind(facts)
    assert bound.params == {
        "alpha": 2.0,
        "rows": "all",
        "layers": [1, *range(9, 16)],
        "defaults": "depth-scaled",
    }
    assert (bound.method, bound.layers, bound.heads, bound.profile) == ("vhr", 8, 48, None)


@pytest.mark.parametrize(
    ("layers", "usual"),
    [(2, [1]), (3, [1, 2]), (4, [1, 3]), (5, [1, 3, 4]), (32, [1, *range(18, 32)])],
)
def test_layer_1_and_the_last_seven_sixteenths(make_facts, layers, usual):
    assert bind(make_facts(layers=layers)).params["layers"] == usual


def test_a_model_of_one_layer_has_to_be_told(make_facts):
    with pytest.raises(CalibrationError, match="the model has 1") as caught:
        bind(make_facts(layers=1))
    assert caught.value.param == "layers"
    assert bind(make_facts(layers=1), layers=[0]).params["layers"] == "all"


def test_equal_settings_have_one_form(facts):
    assert bind(facts, layers=[*range(15, 8, -1), 1], alpha=2, rows="all") == bind(facts)
    assert bind(facts, layers=[*range(16)]) == bind(facts, layers="all")
    assert bind(facts, layers="all").params["defaults"] is None


def test_layers_the_model_has_not_got(facts):
    with pytest.raises(CalibrationError, match="the model has 16 layers") as caught:
        bind(facts, layers=[16])
    assert caught.value.param == "layers"


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("alpha", [-0.1, 4.1, float("nan"), float("inf"), True, "2", None]),
        ("rows", ["first", True, None]),
        ("layers", ["some", [], [1, 1], [-1]]),
        ("heads", ["all"]),
    ],
)
def test_what_is_out_of_range_is_refused(field, values):
    for value in values:
        with pytest.raises(ValidationError) as caught:
            VHRSettings.model_validate({field: value})
        assert caught.value.errors()[0]["loc"][0] == field


def test_settings_of_another_method_are_a_mistake_of_the_caller(make_facts, make_calibrator):
    with pytest.raises(TypeError, match="VHR got Settings"):
        METHOD.bind(make_calibrator().Settings(), make_facts())


def test_it_chooses_heads_and_scales_them_alone():
    assert chooses_heads(METHOD)
    assert not across_heads(METHOD)
    assert not METHOD.reweights
    assert METHOD.pools == ()


@pytest.mark.parametrize(
    ("rows", "prefill", "first"), [("all", Prefill.WHOLE, 0), ("last", Prefill.SPLIT_LAST, 9)]
)
def test_rows(facts, rows, prefill, first):
    bound = bind(facts, rows=rows)
    assert METHOD.prefill(bound) is prefill
    assert METHOD.rows(bound, PROMPT) == Rows(first=first)
    assert all(prefill in each.prefills for each in METHOD.observe(bound, PROMPT))


def test_head_outputs_with_images_and_without(facts):
    bound = bind(facts, layers=[3, 5])
    expected = [HeadOutputs(n, without_images=w) for n in (3, 5) for w in (False, True)]
    assert [*METHOD.observe(bound, Prompt(0))] == expected
    assert [*METHOD.observe(bound, PROMPT)] == expected


def test_other_layers_are_left_alone(facts):
    outputs = np.ones((6, 4))
    assert resolve(facts, outputs, outputs, layer=2) is None


def test_heads_above_the_median_are_reinforced(facts):
    text = np.zeros((6, 2))
    plan = resolve(facts, [[3, 4], [0, 1], [0, 0], [6, 8], [0, 2], [1, 0]], text, alpha=1.5)
    assert plan.details == {"heads_selected": [0, 3, 4]}
    assert plan.heads.tolist() == [True, False, False, True, True, False]
    assert set(plan.parameters["alpha"]) == {1.5}
    assert (plan.pools, plan.statistics) == ((), {})


def test_the_lower_median_of_an_even_number_is_not_above_itself(facts):
    """Of 1 2 2 3 3 3 the lower median is 2."""
    lengths = [3, 2, 1, 3, 2, 3]
    assert chosen(facts, np.diag(lengths), np.zeros((6, 6))) == [0, 3, 5]


@pytest.mark.parametrize("outputs", [np.zeros((6, 3)), np.ones((6, 3))])
def test_heads_that_all_diverge_alike_are_left_alone(facts, outputs):
    plan = resolve(facts, outputs, np.zeros((6, 3)))
    assert plan.details == {"heads_selected": []}
    assert not plan.heads.any()


def test_a_head_that_stands_out_in_text_too_does_not_count(facts):
    text = np.ones((6, 1))
    text[4] = 50
    image = text + np.array([[1], [2], [3], [4], [60], [5]])
    assert chosen(facts, image, text) == [2, 3, 5]  # of 1 2 3 4 0 5, above 2
    text[4] = 1
    image = text + np.array([[1], [2], [3], [4], [60], [5]])
    assert chosen(facts, image, text) == [3, 4, 5]


def test_of_one_head_none_is_above_the_median(make_facts):
    facts = make_facts(layers=16, query_heads=1, kv_heads=1)
    assert chosen(facts, [[1.0, 2.0]], [[0.0, 0.0]]) == []


def test_outputs_beyond_the_squares_of_float32(facts):
    image = 1e25 * np.diag([1.0, 2, 3, 4, 5, 6])
    assert chosen(facts, image, np.zeros((6, 6))) == [3, 4, 5]


@given(SEEDS, st.integers(1, 9), st.floats(0.1, 4))
def test_the_choice_is_the_reference(make_facts, seed, heads, spread):
    facts = make_facts(layers=16, query_heads=heads, kv_heads=1)
    generator = np.random.default_rng(seed)
    text = generator.normal(size=(heads, 4)) * np.exp(spread * generator.normal(size=(heads, 1)))
    image = text + generator.normal(size=(heads, 4)) * np.abs(text).max(1, keepdims=True)
    image, text = image.astype(np.float32), text.astype(np.float32)
    plan = resolve(facts, image, text)
    divergence = np.sort(np.linalg.norm(image.astype(float) - text, axis=1))
    assume((np.diff(divergence) > 1e-9 * divergence[1:]).all())
    expected = reference.vhr_heads(
        torch.from_numpy(image).double(), torch.from_numpy(text).double()
    )
    assert plan.heads.tolist() == expected.tolist()
    assert plan.details["heads_selected"] == expected.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.5])
def test_outputs_are_multiplied(alpha):
    masses = Masses(torch.zeros(3, 6, 0), torch.ones(3, 6))
    result = METHOD.coefficients(masses, {"alpha": torch.full((3, 6), alpha)})
    assert (result.pools, result.weighted, result.apply) == (None, None, None)
    assert (result.rest == 1).all()
    assert (result.scale == alpha).all()
