import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from calibrators import reference
from calibrators.act import ACT, ACTSettings
from calibrators.interface import (
    CalibrationError,
    ColumnMeans,
    Masses,
    Prefill,
    Prompt,
    Rows,
    Span,
    Threshold,
)

METHOD = ACT()
PROMPT = Prompt(length=10)
BETAS = st.floats(0, 1, width=32)
MASSES = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20)
SEEDS = st.integers(0, 2**32 - 1)


def bind(facts, **fields):
    return METHOD.bind(ACTSettings.model_validate(fields), facts)


def coefficients(beta, mass):
    plain = torch.tensor(mass, dtype=torch.float32)[:, None, None]
    masses = Masses(plain, 1 - plain[..., 0])
    return METHOD.coefficients(masses, {"beta": torch.full_like(plain[..., 0], beta)})


def resolve(facts, means, layer=2, **fields):
    """Plan of a layer from column means `[query_heads, P]`."""
    means = np.asarray(means, np.float32)
    bound, prompt = bind(facts, **fields), Prompt(means.shape[1])
    observed = {each: means for each in METHOD.observe(bound, Prompt(9)) if each.layer == layer}
    return METHOD.resolve(bound, layer, facts, prompt, observed)


def causal(seed, length, heads):
    """Probabilities `[length, heads, length]` of a causal layer in float64, with sinks."""
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(length, heads, length, generator=generator, dtype=torch.float64)
    score += 3 * torch.randn(heads, length, generator=generator, dtype=torch.float64)
    hidden = torch.ones(length, length).triu(1).bool()
    return score.masked_fill(hidden[:, None, :], float("-inf")).softmax(-1)


def test_bind_resolves_the_defaults_for_the_model(make_facts):
    bound = bind(make_facts())
    expected = {"beta": 0.4, "alpha": 5.0, "threshold": None, "decode": "frozen"}
    assert bound.params == expected | {"layers": [2, 3], "heads": "all"}
    assert (bound.method, bound.layers, bound.heads, bound.profile) == ("act", 2, 12, None)


def test_bind_counts_a_choice_of_heads(make_facts):
    bound = bind(make_facts(), layers="all", heads={"0": [1], "3": [0, 5]}, threshold=0.1, beta=0)
    assert bound.params == {
        "beta": 0.0,
        "alpha": None,
        "threshold": 0.1,
        "decode": "frozen",
        "layers": [0, 3],
        "heads": {"0": [1], "3": [0, 5]},
    }
    assert (bound.layers, bound.heads) == (2, 3)


@pytest.mark.parametrize("alpha", [5.0, 2])
def test_alpha_beside_a_threshold_is_refused(make_facts, alpha):
    with pytest.raises(CalibrationError, match="not both") as caught:
        bind(make_facts(), alpha=alpha, threshold=0.1)
    assert caught.value.param == "threshold"


@pytest.mark.parametrize("layers", [1, 2])
def test_a_model_without_the_default_layers_has_to_be_told(make_facts, layers):
    shallow = make_facts(layers=layers)
    with pytest.raises(CalibrationError, match=f"the model has {layers}") as caught:
        bind(shallow)
    assert caught.value.param == "layers"
    assert bind(shallow, layers="all").layers == layers


def test_a_head_below_the_default_layers_needs_both(make_facts):
    with pytest.raises(CalibrationError, match="names layer 1") as caught:
        bind(make_facts(), heads={"1": [0]})
    assert caught.value.param == "heads"


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("beta", [-0.1, 1.1, float("nan"), float("inf"), True, "0.4", None]),
        ("alpha", [0, -1, float("nan"), float("inf"), True, "5", None]),
        ("threshold", [0, 1, -0.1, float("nan"), True, "0.1"]),
        ("layers", ["some", [], [1, 1], [-1], [True], [1.0], {}]),
        ("heads", ["some", [], [1, 1], None, {}]),
        ("decode", ["on", True, None, 1]),
        ("gamma", [1.0]),
    ],
)
def test_what_is_out_of_range_is_refused(field, values):
    for value in values:
        with pytest.raises(ValidationError) as caught:
            ACTSettings.model_validate({field: value})
        assert caught.value.errors()[0]["loc"][0] == field


def test_settings_of_another_method_are_a_mistake_of_the_caller(make_facts, make_calibrator):
    with pytest.raises(TypeError, match="ACT got Settings"):
        METHOD.bind(make_calibrator().Settings(), make_facts())


@pytest.mark.parametrize(
    ("fields", "observed"),
    [
        ({}, {2: None, 3: None}),
        ({"layers": "all", "heads": [1, 5]}, dict.fromkeys(range(4), (1, 5))),
        ({"layers": [0, 1], "heads": {"0": [2, 3], "1": [4]}}, {0: (2, 3), 1: (4,)}),
    ],
)
def test_column_means_of_what_is_selected_in_one_step(make_facts, fields, observed):
    bound = bind(make_facts(), **fields)
    assert METHOD.prefill(bound) is Prefill.WHOLE
    assert METHOD.observe(bound, Prompt(9)) == tuple(
        ColumnMeans(*each) for each in observed.items()
    )


@pytest.mark.parametrize(("decode", "generated"), [("frozen", 1), ("row", 1), ("off", 0)])
def test_rows(make_facts, decode, generated):
    assert METHOD.rows(bind(make_facts(), decode=decode), PROMPT) == Rows(generated=bool(generated))


def test_sinks_are_keys_strictly_above_theta_and_never_key_0(make_facts):
    facts = make_facts(query_heads=3)
    theta = 2 / 8
    above = np.nextafter(np.float32(theta), np.float32(1))
    means = np.full((3, 8), theta)
    means[:, 0] = 1
    means[0, [3, 7]] = above
    means[1, 5] = 0.9
    plan = resolve(facts, means, alpha=2.0)
    assert [keys.tolist() for keys in plan.pools[0].keys] == [[3, 7], [5], []]
    assert plan.heads.tolist() == [True, True, False]
    assert plan.parameters["beta"].tolist() == [np.float32(0.4)] * 3
    assert plan.generated_pools is None
    assert plan.pools[0].above is None
    same = resolve(facts, means, threshold=theta)
    assert [keys.tolist() for keys in same.pools[0].keys] == [[3, 7], [5], []]


def test_only_selected_heads_and_layers(make_facts):
    means = np.full((6, 4), 0.9)
    plan = resolve(make_facts(), means, heads={"2": [1, 4]}, threshold=0.5)
    assert np.flatnonzero(plan.heads).tolist() == [1, 4]
    assert [len(keys) for keys in plan.pools[0].keys] == [0, 3, 0, 0, 3, 0]
    assert resolve(make_facts(), means, layer=3, heads={"2": [1, 4]}, threshold=0.5) is None


@pytest.mark.parametrize("length", [1, 2, 10])
@pytest.mark.parametrize("decode", ["frozen", "row", "off"])
def test_a_layer_without_sinks_is_left_alone_and_counted(make_facts, length, decode):
    facts = make_facts()
    plan = resolve(facts, np.full((6, length), 1 / length), decode=decode)
    assert plan.heads.any() == (decode == "row")
    assert all(len(keys) == 0 for keys in plan.pools[0].keys)
    assert plan.statistics == {"sinks": 0.0}


@pytest.mark.parametrize(
    ("fields", "above"),
    [({"alpha": 3.0}, Threshold(3.0, relative=True)), ({"threshold": 0.2}, Threshold(0.2))],
)
def test_generated_rows_that_find_their_own_sinks(make_facts, fields, above):
    facts = make_facts()
    plan = resolve(facts, np.full((6, 4), 0.1), decode="row", heads=[0, 2], **fields)
    (pool,) = plan.generated_pools
    assert (pool.keys, pool.above) == (Span(1, facts.max_model_len), above)
    assert np.flatnonzero(plan.heads).tolist() == [0, 2]


def test_sinks_are_counted_per_selected_head(make_facts):
    facts = make_facts()
    fields = {"heads": {"2": [0], "3": [1, 2, 3]}, "threshold": 0.5}
    means = np.full((6, 9), 0.9)
    means[3, 4:] = 0
    plans = [resolve(facts, means, layer=layer, **fields) for layer in (2, 3)]
    per_layer = [plan.statistics["sinks"] for plan in plans]
    # Heads 0, 1 and 2 have 8 sinks, head 3 has 3.
    assert sum(per_layer) / 2 == pytest.approx((8 + 8 + 8 + 3) / 4)


@given(SEEDS, st.integers(1, 24), st.floats(0.05, 6), BETAS)
def test_a_layer_is_the_reference(make_facts, seed, length, alpha, beta):
    facts = make_facts(query_heads=3, kv_heads=3)
    p = causal(seed, length, 3)
    means = reference.column_means(p)
    plan = resolve(facts, means.numpy(), alpha=alpha, beta=beta)
    sinks = (means > alpha / length).float()
    assume(((means - alpha / length).abs() > 1e-6).all())
    sinks[:, 0] = 0
    for head, keys in enumerate(plan.pools[0].keys):
        assert keys.dtype == np.int32
        assert keys.tolist() == sinks[head].nonzero()[:, 0].tolist()
    mass, rest = (torch.where(inside, p, 0).sum(-1) for inside in (sinks > 0, sinks == 0))
    masses = Masses(mass.float()[..., None], rest.float())
    found = METHOD.coefficients(masses, {"beta": torch.full(mass.shape, beta)})
    on = found.apply & torch.from_numpy(plan.heads)
    rewritten = reference.recombine(p, [sinks > 0], [found.pools[..., 0]], found.rest)
    truth = reference.act(p, sinks > 0, torch.tensor(beta, dtype=torch.float64))
    result = torch.where(on[..., None], rewritten, p)
    torch.testing.assert_close(result, truth, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(result.sum(-1), torch.ones_like(mass), atol=1e-5, rtol=0)


@given(BETAS, MASSES)
@example(0.0, [1 - 2**-20, 1 - 2**-19])
def test_mass_is_conserved(beta, mass):
    result = coefficients(beta, mass)
    m = torch.tensor(mass, dtype=torch.float64)[:, None]
    total = result.pools[..., 0].double() * m + result.rest.double() * (1 - m)
    on = result.apply
    torch.testing.assert_close(total[on], torch.ones_like(total)[on], atol=1e-6, rtol=0)


@given(BETAS, MASSES)
@example(0.0, [1.0, 1 - 2**-21, 1 - 2**-20, 1 - 2**-19])
def test_rows_without_sinks_or_with_nothing_else_keep_their_output(beta, mass):
    result = coefficients(beta, mass)
    expected = [0 < each and not 1 - each < 1e-6 for each in mass]
    assert result.apply.flatten().tolist() == expected


@given(MASSES)
def test_beta_1_is_exactly_nothing(mass):
    result = coefficients(1.0, mass)
    assert (result.rest == 1).all()
    assert (result.pools == 1).all()


@given(BETAS, MASSES)
@example(0.0, [1.0, 1 - 2**-24, 1 - 2**-20])
def test_whatever_the_masses_the_result_is_finite(beta, mass):
    result = coefficients(beta, mass)
    for tensor in (result.rest, result.pools, *result.statistics.values()):
        assert torch.isfinite(tensor).all()


def test_a_mass_that_is_no_number_shows():
    result = coefficients(0.4, [float("nan")])
    assert result.apply.item()
    assert not torch.isfinite(result.rest).any()


def test_statistics_are_the_mass_of_the_sinks():
    result = coefficients(0.25, [0.5, 0.0])
    assert result.statistics["sink_mass_before"].flatten().tolist() == [0.5, 0.0]
    assert result.statistics["sink_mass_after"].flatten().tolist() == [0.125, 0.0]
