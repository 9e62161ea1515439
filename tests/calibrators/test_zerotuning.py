import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from calibrators import reference
from calibrators.canonical import canonical_json
from calibrators.interface import CalibrationError, Masses, Prefill, Prompt, Rows, Span
from calibrators.zerotuning import ZeroTuning, ZeroTuningProfileSettings, ZeroTuningSettings

METHOD = ZeroTuning()
PROMPT = Prompt(length=10, images=(Span(2, 4),))
GAMMAS = st.floats(0, 100, exclude_min=True, allow_subnormal=False, width=32)
MASSES = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20)


def bind(facts, **fields):
    return METHOD.bind(ZeroTuningSettings.model_validate(fields), facts)


def coefficients(gamma, mass):
    plain = torch.tensor(mass, dtype=torch.float32)[:, None, None]
    masses = Masses(plain, 1 - plain[..., 0])
    return METHOD.coefficients(masses, {"gamma": torch.full_like(plain[..., 0], gamma)})


def test_bind_resolves_and_counts(make_facts):
    bound = bind(make_facts(), gamma=2, heads={"1": [0, 5], "3": [2]})
    assert bound.params == {"gamma": 2.0, "layers": [1, 3], "heads": {"1": [0, 5], "3": [2]}}
    assert (bound.method, bound.layers, bound.heads, bound.profile) == ("zerotuning", 2, 3, None)
    whole = bind(make_facts(), gamma=0.6)
    assert (whole.layers, whole.heads) == (4, 24)


def test_gamma_is_required(make_facts):
    with pytest.raises(CalibrationError, match="0 < gamma <= 100") as caught:
        bind(make_facts(), layers=[0])
    assert caught.value.param == "gamma"


@pytest.mark.parametrize("gamma", [0, -1, 100.5, float("nan"), float("inf"), True, "1", [1]])
def test_gamma_out_of_range_is_refused(gamma):
    with pytest.raises(ValidationError) as caught:
        ZeroTuningSettings.model_validate({"gamma": gamma})
    assert caught.value.errors()[0]["loc"] == ("gamma",)


def test_settings_of_another_method_are_a_mistake_of_the_caller(make_facts, make_calibrator):
    with pytest.raises(TypeError, match="ZeroTuning got Settings"):
        METHOD.bind(make_calibrator().Settings(), make_facts())


def test_any_prefill_nothing_observed_every_row(make_facts):
    bound = bind(make_facts(), gamma=2)
    assert METHOD.prefill(bound) is Prefill.ANY
    assert METHOD.observe(bound, PROMPT) == ()
    assert METHOD.rows(bound, PROMPT) == Rows(first=0, skip=())


def test_resolve_puts_gamma_on_selected_heads(make_facts):
    bound = bind(make_facts(), gamma=0.3, heads={"1": [0, 5]})
    plan = METHOD.resolve(bound, 1, make_facts(), PROMPT, {})
    assert plan.heads.tolist() == [True, False, False, False, False, True]
    assert plan.parameters["gamma"].dtype == np.float32
    assert plan.parameters["gamma"].tolist() == [np.float32(0.3), 1, 1, 1, 1, np.float32(0.3)]
    assert [pool.keys.tolist() for pool in plan.pools] == [[0]]
    assert METHOD.resolve(bound, 2, make_facts(), PROMPT, {}) is None


@given(GAMMAS, MASSES)
@example(1e-9, [1.0, 1 - 2**-24])
@example(1e-5, [1.0, 1 - 2**-24])
def test_mass_is_conserved(gamma, mass):
    result = coefficients(gamma, mass)
    m = torch.tensor(mass)[:, None]
    total = result.pools[..., 0] * m + result.rest * (1 - m)
    # A handful of float32 roundings, none of them amplified however small gamma is.
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-6, rtol=0)


@given(GAMMAS)
@example(1e-9)
@example(0.3)
def test_a_row_that_sees_key_0_alone_stays_as_it_is(gamma):
    result = coefficients(gamma, [1.0])
    assert result.pools.item() == 1
    # Factor of the stock output's rounding error, all that is left of the other keys.
    assert result.rest.item() == 1
    assert result.statistics["key0_mass_after"].item() == 1


@given(MASSES)
def test_neutral_gamma_is_exactly_one(mass):
    result = coefficients(1.0, mass)
    assert (result.rest == 1).all()
    assert (result.pools == 1).all()


@given(GAMMAS, MASSES)
def test_rows_that_do_not_see_key_0_keep_their_output(gamma, mass):
    result = coefficients(gamma, mass)
    assert result.apply.flatten().tolist() == [each > 0 for each in mass]


@given(GAMMAS, MASSES)
@example(1e-9, [1.0, 1 - 2**-24])
@example(1e-5, [1.0, 1 - 2**-24])
def test_whatever_the_masses_the_result_is_finite(gamma, mass):
    result = coefficients(gamma, mass)
    for tensor in (result.rest, result.pools, *result.statistics.values()):
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("gamma", [0.01, 0.3, 1.0, 2.0, 50.0])
def test_coefficients_give_the_reference(gamma):
    p = torch.rand(7, 3, 9, generator=torch.Generator().manual_seed(1)).softmax(-1)
    parameter = torch.full((7, 3), gamma)
    result = METHOD.coefficients(Masses(p[..., :1], 1 - p[..., 0]), {"gamma": parameter})
    key0 = torch.arange(9) == 0
    rewritten = reference.recombine(p, [key0], [result.pools[..., 0]], result.rest)
    truth = reference.zerotuning(p.double(), parameter.double())
    torch.testing.assert_close(rewritten.double(), truth, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        result.statistics["key0_mass_after"].double(), truth[..., 0], atol=1e-6, rtol=1e-5
    )
    assert torch.equal(result.statistics["key0_mass_before"], p[..., 0])


STRENGTHS = {"1": {"0": 0.5, "5": 2}, "3": {"2": 0.5, "4": 0.25}}


def bind_profiled(facts, **fields):
    settings = ZeroTuningProfileSettings.model_validate({"strengths": STRENGTHS, **fields})
    return METHOD.bind(settings, facts)


@pytest.mark.parametrize(
    ("fields", "params", "heads"),
    [
        (
            {},
            {
                "gamma": {"1": {"0": 0.5, "5": 2.0}, "3": {"2": 0.5, "4": 0.25}},
                "layers": [1, 3],
                "heads": {"1": [0, 5], "3": [2, 4]},
            },
            4,
        ),
        (
            {"layers": [0, 1]},
            {"gamma": {"1": {"0": 0.5, "5": 2.0}}, "layers": [1], "heads": [0, 5]},
            2,
        ),
        # One value everywhere has the form of a request that says so.
        (
            {"heads": [0, 2]},
            {"gamma": 0.5, "layers": [1, 3], "heads": {"1": [0], "3": [2]}},
            2,
        ),
        ({"heads": {"3": [1, 4]}}, {"gamma": 0.25, "layers": [3], "heads": [4]}, 1),
        (
            {"gamma": 3},
            {"gamma": 3.0, "layers": [1, 3], "heads": {"1": [0, 5], "3": [2, 4]}},
            4,
        ),
        ({"gamma": 3, "heads": [5]}, {"gamma": 3.0, "layers": [1], "heads": [5]}, 1),
    ],
    ids=str,
)
def test_strengths_give_gammas_layers_and_heads(make_facts, fields, params, heads):
    bound = bind_profiled(make_facts(), **fields)
    assert (bound.params, bound.layers, bound.heads) == (params, len(params["layers"]), heads)
    if not isinstance(params["gamma"], dict):
        assert bound == bind(make_facts(), **params)


def test_the_order_of_strengths_does_not_matter(make_facts):
    turned = {layer: dict(reversed(heads.items())) for layer, heads in reversed(STRENGTHS.items())}
    bounds = [bind_profiled(make_facts()), bind_profiled(make_facts(), strengths=turned)]
    assert bounds[0] == bounds[1]
    assert len({canonical_json([(bound, 1)], "model") for bound in bounds}) == 1


def test_strengths_of_every_head_select_all(make_facts):
    strengths = {str(i): {str(h): 0.5 + i + h for h in range(6)} for i in range(4)}
    params = bind_profiled(make_facts(), strengths=strengths).params
    assert (params["layers"], params["heads"]) == ("all", "all")


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"layers": [0, 2]}, "layers", "in 2 layers, 1 the first and 3 the last"),
        ({"heads": [1]}, "heads", "leave out all"),
        ({"layers": [1], "heads": [4]}, "heads", "leave out all"),
        ({"layers": [4]}, "layers", "0 to 3 are allowed"),
        ({"strengths": {"4": {"0": 1}}}, "strengths", "4 layers: 0 to 3 are allowed"),
        ({"strengths": {"2": {"6": 1}}}, "strengths", "6 query heads (in layer 2): 0 to 5"),
    ],
)
def test_strengths_that_select_nothing_or_what_is_not_there(make_facts, fields, param, said):
    with pytest.raises(CalibrationError) as caught:
        bind_profiled(make_facts(), **fields)
    assert caught.value.param == param
    assert said in caught.value.message


@pytest.mark.parametrize("gamma", [0, -1, 100.5, float("nan"), True, "1"])
def test_strengths_have_the_range_of_gamma(gamma):
    with pytest.raises(ValidationError) as caught:
        ZeroTuningProfileSettings.model_validate({"strengths": {"1": {"0": gamma}}})
    assert caught.value.errors()[0]["loc"] == ("strengths", "1", "0")


def test_no_request_can_send_strengths():
    with pytest.raises(ValidationError, match="Extra inputs"):
        ZeroTuningSettings.model_validate({"gamma": 1, "strengths": STRENGTHS})


def test_resolve_puts_each_gamma_on_its_head(make_facts):
    bound = bind_profiled(make_facts())
    plan = METHOD.resolve(bound, 3, make_facts(), PROMPT, {})
    assert plan.heads.tolist() == [False, False, True, False, True, False]
    assert plan.parameters["gamma"].tolist() == [1, 1, 0.5, 1, 0.25, 1]
    assert plan.parameters["gamma"].dtype == np.float32
    assert METHOD.resolve(bound, 2, make_facts(), PROMPT, {}) is None
