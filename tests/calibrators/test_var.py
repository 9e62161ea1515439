import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from calibrators import reference
from calibrators.interface import (
    CalibrationError,
    Masses,
    Prefill,
    Prompt,
    ResidualPeaks,
    Rows,
    Skip,
    Span,
)
from calibrators.var import VAR, VARSettings
from tests.calibrators.dense import among, causal, measured, parameters

METHOD = VAR()
IMAGES = (Span(3, 8), Span(10, 13))
PROMPT = Prompt(length=16, images=IMAGES)
SEEDS = st.integers(0, 2**32 - 1)
SHARES = st.floats(0, 1)


@pytest.fixture
def facts(make_facts):
    return make_facts(layers=6, modality="vision")


def bind(facts, **fields):
    return METHOD.bind(VARSettings.model_validate({"sink_dims": [7, 3], **fields}), facts)


def resolve(facts, sinks, prompt=PROMPT, layer=2, **fields):
    """Plan of a layer in which these positions stand out."""
    peaks = np.full(prompt.length, 19.0, np.float32)
    peaks[sinks] = 21
    bound = bind(facts, **fields)
    observed = {each: peaks for each in METHOD.observe(bound, Prompt(0)) if each.layer == layer}
    return METHOD.resolve(bound, layer, facts, prompt, observed)


def coefficients(visual, text, others, share=0.6, rho=0.5, least=0.2):
    """Of one row and head."""
    plain = torch.tensor([[[visual, text, others]]])
    given = {"share": share, "rho": rho, "min_visual_mass": least}
    return METHOD.coefficients(
        Masses(plain, 1 - plain.sum(-1)), {n: torch.full((1, 1), v) for n, v in given.items()}
    )


def test_bind_resolves_the_defaults_for_the_model(facts):
    bound = bind(facts)
    assert bound.params == {
        "tau": 20.0,
        "rho": 0.5,
        "share": 0.6,
        "min_visual_mass": 0.2,
        "sink_dims": [3, 7],
        "layers": [2, 3, 4],
    }
    assert (bound.method, bound.layers, bound.heads, bound.profile) == ("var", 3, 18, None)


@pytest.mark.parametrize("layers", ["all", [5, 3, 0, 1, 2, 4]])
def test_equal_settings_have_one_form(facts, layers):
    bound = bind(facts, layers=layers, sink_dims=[3, 7])
    assert bound.params == bind(facts, layers="all").params
    assert (bound.params["layers"], bound.layers, bound.heads) == ("all", 6, 36)
    assert [each.layer for each in METHOD.observe(bound, PROMPT)] == [*range(6)]


def test_a_model_whose_channels_nobody_names_is_refused(facts):
    with pytest.raises(CalibrationError, match="`trimtab profile var`") as caught:
        METHOD.bind(VARSettings(), facts)
    assert caught.value.param == "sink_dims"


@pytest.mark.parametrize(
    ("fields", "param", "match"),
    [
        ({"sink_dims": [0, 192]}, "sink_dims", "index 192, but the model has 192 channels"),
        ({"layers": [6]}, "layers", "the model has 6 layers"),
    ],
)
def test_what_the_model_has_not_got(facts, fields, param, match):
    with pytest.raises(CalibrationError, match=match) as caught:
        bind(facts, **fields)
    assert caught.value.param == param


@pytest.mark.parametrize("layers", [1, 3])
def test_a_model_without_the_default_layers_has_to_be_told(make_facts, layers):
    shallow = make_facts(layers=layers)
    with pytest.raises(CalibrationError, match=f"the model has {layers}") as caught:
        bind(shallow)
    assert caught.value.param == "layers"
    assert bind(shallow, layers=[0]).layers == 1
    assert bind(make_facts(layers=4)).params["layers"] == [2]


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("tau", [0, -1, float("nan"), float("inf"), True, "20", None]),
        ("rho", [-0.1, 1.1, float("nan"), True, None]),
        ("share", [-0.1, 1.1, float("nan"), True, None]),
        ("min_visual_mass", [-0.1, 1.1, float("nan"), True, None]),
        ("layers", ["some", [], [1, 1], [-1], [True]]),
        ("sink_dims", [[], [1, 1], [-1], [True], [1.0], "all", 3]),
        ("heads", ["all"]),
    ],
)
def test_what_is_out_of_range_is_refused(field, values):
    for value in values:
        with pytest.raises(ValidationError) as caught:
            VARSettings.model_validate({field: value})
        assert caught.value.errors()[0]["loc"][0] == field


def test_settings_of_another_method_are_a_mistake_of_the_caller(make_facts, make_calibrator):
    with pytest.raises(TypeError, match="VAR got Settings"):
        METHOD.bind(make_calibrator().Settings(), make_facts())


def test_peaks_of_the_selected_layers_in_any_chunks(facts):
    bound = bind(facts)
    assert METHOD.prefill(bound) is Prefill.ANY
    assert METHOD.observe(bound, PROMPT) == tuple(ResidualPeaks(n, (3, 7)) for n in (2, 3, 4))


def test_rows_are_text_behind_the_first_image(facts):
    bound = bind(facts)
    assert METHOD.rows(bound, PROMPT) == Rows(first=8, skip=(Span(10, 13),))
    assert METHOD.rows(bound, Prompt(5)) == Rows(first=5)
    cut = Prompt(20, (Span(2, 4), Span(5, 7), Span(9, 11)), extents=(Span(2, 7), Span(9, 11)))
    assert METHOD.rows(bound, cut) == Rows(first=7, skip=(Span(5, 7), Span(9, 11)))


def test_pools_are_sinks_in_images_sinks_outside_and_the_other_image_tokens(facts):
    plan = resolve(facts, [0, 4, 9, 12], share=0.25)
    assert [pool.keys.tolist() for pool in plan.pools] == [[4, 12], [0, 9], [3, 5, 6, 7, 10, 11]]
    assert all(pool.keys.dtype == np.int32 for pool in plan.pools)
    assert plan.heads.all()
    assert plan.statistics == {"visual_sinks": 2.0, "text_sinks": 2.0}
    assert {name: set(values) for name, values in plan.parameters.items()} == {
        "rho": {0.5},
        "share": {0.25},
        "min_visual_mass": {np.float32(0.2)},
    }


def test_a_sink_stands_out_by_more_than_tau(facts):
    prompt = Prompt(4, (Span(1, 3),))
    peaks = np.array([0, 5, np.nextafter(np.float32(5), np.float32(6)), 0], np.float32)
    bound = bind(facts, tau=5)
    plan = METHOD.resolve(bound, 2, facts, prompt, {ResidualPeaks(2, (3, 7)): peaks})
    assert [pool.keys.tolist() for pool in plan.pools] == [[2], [], [1]]


def test_other_layers_are_left_alone(facts):
    bound = bind(facts, layers=[2])
    assert METHOD.resolve(bound, 3, facts, PROMPT, {}) is None


@pytest.mark.parametrize("sinks", [[], [0], [9, 15]])
def test_a_layer_without_visual_sinks_is_a_skip_that_is_measured(facts, sinks):
    skip = resolve(facts, sinks)
    assert isinstance(skip, Skip)
    assert skip.reason.startswith("no image token is an attention sink")
    assert skip.plan.statistics == {"visual_sinks": 0.0, "text_sinks": float(len(sinks))}
    p = causal(0, 16, 6)[8:]
    masses, _ = measured(p, skip.plan, torch.float32)
    result = METHOD.coefficients(masses, parameters(skip.plan, len(p)))
    assert not result.apply.any()
    assert result.eligible.all()
    assert not result.statistics["selected_share"].any()


def test_a_prompt_without_image_is_a_skip(facts):
    assert resolve(facts, [0], Prompt(6)) == Skip("the prompt has no image")


@given(
    SEEDS,
    SHARES,
    st.floats(0, 1),
    st.floats(0, 0.6),
    st.sets(st.integers(0, 15), max_size=6),
    st.booleans(),
)
def test_a_layer_is_the_reference(make_facts, seed, share, rho, least, sinks, double):
    facts = make_facts(layers=6, query_heads=4)
    fields = {"share": share, "rho": rho, "min_visual_mass": least}
    found = resolve(facts, sorted(sinks), **fields)
    plan = found.plan if isinstance(found, Skip) else found
    rows = [*range(8, 10), *range(13, 20)]
    p = causal(seed, 20, 4)[rows]
    images = among([*range(3, 8), *range(10, 13)], 20)
    chosen = among(sorted(sinks), 20)
    selected = reference.var_selected(p, images, chosen, rho, least)
    dtype = torch.float64 if double else torch.float32
    masses, masks = measured(p, plan, dtype)
    seen = p[..., images].sum(-1)
    on_sinks = p[..., images & chosen].sum(-1)
    assume(((seen - least).abs() > 1e-6).all())
    assume(((1 - on_sinks / seen - rho).abs() > 1e-6)[on_sinks > 0].all())
    result = METHOD.coefficients(masses, parameters(plan, len(rows), dtype))
    assert torch.equal(result.apply, selected)
    factors = [result.pools[..., g].double() for g in range(3)]
    rewritten = reference.recombine(p, masks, factors, result.rest.double())
    rewritten = torch.where(result.apply[..., None], rewritten, p)
    truth = reference.var(p, images, chosen, share, rho, least)
    torch.testing.assert_close(rewritten, truth, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(rewritten.sum(-1), torch.ones_like(seen), atol=2e-6, rtol=0)
    others = rewritten[..., images & ~chosen].sum(-1).to(dtype)
    assert torch.equal(result.statistics["selected_share"], selected.to(dtype))
    torch.testing.assert_close(
        result.statistics["visual_nonsink_mass_after"], others, atol=4e-6, rtol=0
    )
    assert torch.equal(result.statistics["visual_nonsink_mass_before"], masses.plain[..., 2])


@pytest.mark.parametrize(
    ("visual", "others", "selected"),
    [
        (0.25, 0.25, True),  # half of what is seen is on sinks
        (0.2500001, 0.25, False),
        (0.0, 0.5, False),  # no sink in sight
        (0.5, 0.0, False),  # nobody to give to
        (0.125, 0.125, True),  # just enough of the image
        (0.0625, 0.125, False),
        (0.0, 0.0, False),
    ],
)
def test_edges_of_the_selection(visual, others, selected):
    result = coefficients(visual, 0.1, others, rho=0.5, least=0.25)
    assert result.apply.item() is selected
    assert result.statistics["selected_share"].item() == selected


def test_every_pool_gets_its_factor():
    result = coefficients(0.25, 0.125, 0.5, share=0.5)
    assert result.pools.flatten().tolist() == [0.5, 0.5, 1.375]
    assert result.rest.item() == 1
    assert result.statistics["visual_nonsink_mass_before"].item() == 0.5
    assert result.statistics["visual_nonsink_mass_after"].item() == 0.6875


def test_share_0_is_exactly_nothing():
    result = coefficients(0.2, 0.3, 0.4, share=0.0)
    assert result.apply.item()
    assert (result.rest == 1).all()
    assert (result.pools == 1).all()


@given(*[st.floats(0, 1, width=32)] * 6)
def test_whatever_the_masses_the_result_is_finite(visual, text, others, share, rho, least):
    result = coefficients(visual, text, others, share, rho, least)
    for tensor in (result.rest, result.pools, *result.statistics.values()):
        assert torch.isfinite(tensor).all()


def test_a_mass_that_is_no_number_shows():
    result = coefficients(float("nan"), 0.1, 0.5)
    assert result.apply.item()
    assert not torch.isfinite(result.pools).all()
