import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibrators.canonical import canonical_json, digest
from calibrators.interface import Bound, ModelFacts
from calibrators.zerotuning import ZeroTuning, ZeroTuningSettings

FACTS = ModelFacts("LlamaForCausalLM", 3, 4, 2, 32, 128, 512)
METHOD = ZeroTuning()


def bound(**params):
    return Bound("method", params, 1, 1)


def digest_of(settings, model="model"):
    calibration = METHOD.bind(ZeroTuningSettings.model_validate(settings), FACTS)
    return digest(canonical_json([(calibration, METHOD.revision)], model))


def some(limit):
    return st.lists(st.integers(0, limit - 1), min_size=1, unique=True)


SETTINGS = st.fixed_dictionaries(
    {"gamma": st.sampled_from([0.5, 1, 1.0000000000000002, 2, 100])},
    optional={
        "layers": st.just("all") | some(3),
        "heads": st.just("all")
        | some(4)
        | st.dictionaries(st.sampled_from(["0", "1", "2"]), some(4), min_size=3),
    },
).filter(lambda s: not (isinstance(s.get("heads"), dict) and isinstance(s.get("layers"), list)))


def meaning(settings):
    """Gamma and the set of (layer, head) pairs, worked out from first principles."""
    layers, heads = settings.get("layers", "all"), settings.get("heads", "all")
    each = range(3) if layers == "all" else layers
    pairs = {
        (layer, head)
        for layer in each
        for head in range(4)
        if heads == "all" or head in (heads[str(layer)] if isinstance(heads, dict) else heads)
    }
    return float(settings["gamma"]), pairs


@given(SETTINGS, SETTINGS)
def test_digests_are_equal_exactly_where_settings_mean_the_same(left, right):
    assert (digest_of(left) == digest_of(right)) == (meaning(left) == meaning(right))


@pytest.mark.parametrize(
    "spelling",
    [
        {"gamma": 2},
        {"method": "zerotuning", "gamma": 2.0, "layers": [2, 0, 1]},
        {"heads": [3, 1, 2, 0], "gamma": 2.0},
        {"gamma": 2, "heads": {"2": [0, 1, 2, 3], "0": [3, 2, 1, 0], "1": [0, 1, 2, 3]}},
    ],
)
def test_spellings_of_one_calibration_share_a_digest(spelling):
    assert digest_of(spelling) == digest_of({"gamma": 2.0, "layers": "all", "heads": "all"})


def test_the_order_of_keys_does_not_matter():
    one, other = bound(a=1, b={"x": 1, "y": 2}), bound(b={"y": 2, "x": 1}, a=1)
    assert canonical_json([(one, 1)], "m") == canonical_json([(other, 1)], "m")


def test_everything_else_matters():
    first, second = bound(a=1), bound(a=2)
    forms = [
        canonical_json([(first, 1)], "m"),
        canonical_json([(first, 1)], "n"),
        canonical_json([(first, 2)], "m"),
        canonical_json([(second, 1)], "m"),
        canonical_json([(first, 1), (second, 1)], "m"),
        canonical_json([(second, 1), (first, 1)], "m"),
        canonical_json([(Bound("another", {"a": 1}, 1, 1), 1)], "m"),
    ]
    assert len(set(forms)) == len({digest(form) for form in forms}) == len(forms)


def test_the_form_is_json_and_refuses_what_is_not():
    assert json.loads(canonical_json([(bound(a=1), 3)], "m"))["calibrations"] == [
        {"method": "method", "revision": 3, "params": {"a": 1}}
    ]
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json([(bound(a=float("nan")), 1)], "m")


def test_a_digest_is_sha256_in_hex():
    assert digest("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
