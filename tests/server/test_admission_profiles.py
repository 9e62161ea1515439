"""Profiles and presets in requests."""

import json

import pytest

from calibrators import registry
from calibrators.profiles import ProfileError
from server.admission import Admission, Refusal
from server.presets import Preset, PresetError

CALM = {"method": "zerotuning", "profile": "calm"}
STRENGTHS = {"1": {"0": 0.5, "5": 2}, "3": {"2": 0.25}}


@pytest.fixture
def make_admission(make_facts, make_profile):
    def make(*profiles, presets=None, **options):
        named = [make_profile(**fields) for fields in profiles]
        return Admission(
            registry.load(),
            make_facts(),
            "model",
            profiles={profile.name: profile for profile in named},
            presets={name: Preset(name, each) for name, each in (presets or {}).items()},
            **options,
        )

    return make


def refused(field, admission):
    with pytest.raises(Refusal) as caught:
        admission.admit(field)
    return caught.value


def test_a_profile_supplies_what_a_request_leaves_out(make_admission):
    admission = make_admission({})
    (bound,) = admission.admit(CALM | {"gamma": None}).bounds
    assert bound.params == {"gamma": 0.5, "layers": [1, 3], "heads": [0, 2]}
    assert (bound.profile, bound.layers, bound.heads) == ("calm", 2, 4)
    (bound,) = admission.admit(CALM | {"gamma": 2}).bounds
    assert bound.params == {"gamma": 2.0, "layers": [1, 3], "heads": [0, 2]}
    assert bound.profile == "calm"


def test_the_digest_covers_values_and_not_the_profiles_name(make_admission):
    admission = make_admission(
        {},
        {"name": "same"},
        {"name": "equal", "parameters": {}, "strengths": {"1": {"0": 0.5, "2": 0.5}}},
        {"name": "heads", "parameters": {}, "strengths": STRENGTHS},
        {"name": "other", "parameters": {}, "strengths": STRENGTHS | {"3": {"2": 0.26}}},
    )

    def digest(**fields):
        return admission.admit({"method": "zerotuning", **fields}).digest

    explicit = {"gamma": 0.5, "layers": [1, 3], "heads": [0, 2]}
    assert digest(profile="calm") == digest(profile="same") == digest(**explicit)
    assert digest(profile="equal") == digest(gamma=0.5, layers=[1], heads=[0, 2])
    distinct = [digest(profile=name) for name in ("calm", "equal", "heads", "other")]
    assert len(set(distinct)) == 4


def test_strengths_reach_the_receipt_as_json(make_admission):
    admission = make_admission({"parameters": {}, "strengths": STRENGTHS})
    (bound,) = admission.admit(CALM).bounds
    assert bound.params["gamma"] == {"1": {"0": 0.5, "5": 2.0}, "3": {"2": 0.25}}
    assert json.loads(json.dumps(bound.params)) == bound.params
    (bound,) = admission.admit(CALM | {"gamma": 3, "layers": [1]}).bounds
    assert bound.params == {"gamma": 3.0, "layers": [1], "heads": [0, 5]}
    refusal = refused(CALM | {"layers": [0]}, admission)
    assert (refusal.reason, refusal.param) == ("invalid_parameter", "calibration.layers")


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (CALM | {"profile": "x"}, "no profile 'x'; profiles for zerotuning: calm, mild"),
        ({"method": "act", "profile": "calm"}, "is for zerotuning, not act; profiles for act: top"),
    ],
)
@pytest.mark.parametrize("place", ["object", "list"])
def test_an_unknown_profile_is_refused_with_those_there_are(make_admission, entry, said, place):
    admission = make_admission(
        {"name": "mild"}, {}, {"name": "top", "method": "act", "parameters": {}}
    )
    refusal = refused(entry if place == "object" else [entry], admission)
    where = "calibration" if place == "object" else "calibration[0]"
    assert (refusal.reason, refusal.method) == ("unknown_profile", entry["method"])
    assert refusal.param == f"{where}.profile"
    assert said in refusal.message


def test_the_list_of_profiles_is_bounded(make_admission):
    admission = make_admission(*({"name": f"profile-{i:03}"} for i in range(200)))
    assert len(refused(CALM | {"profile": "x" * 128}, admission).message) < 600


def test_a_request_is_checked_by_itself_first(make_admission):
    admission = make_admission({})
    assert refused(CALM | {"gamma": 0}, admission).param == "calibration.gamma"
    assert refused(CALM | {"strengths": STRENGTHS}, admission).param == "calibration.strengths"


def test_what_excludes_each_other_is_replaced(make_admission):
    admission = make_admission({"method": "act", "parameters": {"alpha": 9, "beta": 0.1}})
    (bound,) = admission.admit({"method": "act", "profile": "calm", "threshold": 0.3}).bounds
    assert (bound.params["alpha"], bound.params["threshold"]) == (None, 0.3)
    assert bound.params["beta"] == 0.1


@pytest.mark.parametrize(
    ("fields", "field", "said"),
    [
        ({"method": "pasta"}, "method", "no calibrator 'pasta'; this server offers: act, gift"),
        ({"parameters": {"gamma": 0}}, "parameters.gamma", "greater than 0"),
        ({"parameters": {}}, "parameters.gamma", "gamma is required"),
        ({"parameters": {"gamma": 1, "layers": [4]}}, "parameters.layers", "0 to 3 are allowed"),
        ({"parameters": {"gama": 1}}, "parameters.gama", "no parameter 'gama'"),
        ({"parameters": {}, "strengths": {"1": {"0": 0}}}, "strengths", "greater than 0"),
        ({"parameters": {}, "strengths": {"4": {"0": 1}}}, "strengths", "0 to 3 are allowed"),
        (
            {"parameters": {"gamma": 1}, "strengths": STRENGTHS},
            "parameters.gamma",
            "strengths take its place",
        ),
        (
            {"method": "act", "parameters": {}, "strengths": STRENGTHS},
            "strengths",
            "act has no parameter 'strengths'",
        ),
    ],
)
def test_a_profile_that_no_request_could_use_is_refused(make_admission, fields, field, said):
    with pytest.raises(ProfileError) as caught:
        make_admission(fields)
    assert str(caught.value).startswith(f"calm.json: {field}: ")
    assert said in caught.value.message


def test_a_profile_for_another_model_is_refused(make_admission, make_profile):
    model = make_profile().model.model_dump() | {"layers": 40}
    with pytest.raises(ProfileError, match=r"with 40 layers .* the model is .* with 4 layers"):
        make_admission({"model": model})


PRESETS = {
    "mild": {"method": "zerotuning", "gamma": 0.8},
    "own": CALM | {"gamma": 2},
    "listed": [{"method": "act"}],
}


def test_a_preset_is_a_calibration_with_a_name(make_admission):
    admission = make_admission({}, presets=PRESETS)
    for name, calibration in PRESETS.items():
        assert admission.admit(name) == admission.admit(calibration)
    assert admission.admit("own").bounds[0].profile == "calm"


def test_a_preset_may_be_the_default(make_admission):
    admission = make_admission({}, presets=PRESETS, default="mild")
    assert admission.admit(None) == admission.admit("mild")
    assert admission.admit("none") is None


def test_a_preset_stands_alone(make_admission):
    admission = make_admission({}, presets=PRESETS)
    for field in (["mild"], {"method": "mild"}):
        refusal = refused(field, admission)
        assert refusal.reason == "unknown_method"
        assert "the preset of that name stands alone" in refusal.message
    refusal = refused("other", admission)
    assert (refusal.reason, refusal.param) == ("unknown_method", "calibration")
    assert "presets: listed, mild, own" in refusal.message


@pytest.mark.parametrize(
    ("name", "calibration", "said"),
    [
        ("act", {"method": "act"}, "has the name of a calibrator"),
        ("a", {}, 'needs the key "method"'),
        ("a", [], "lists 0 calibrations"),
        ("a", {"method": "none"}, "no calibrator 'none'"),
        ("a", {"method": "zerotuning", "gamma": float("nan")}, "finite number"),
        ("a", {"method": "zerotuning", "gamma": 1, "x": 1}, "no parameter 'x'"),
        ("a", {"method": "zerotuning", "profile": "none"}, "no profile 'none'"),
        ("a", [{"method": "act"}] * 2, "both change attention weights"),
    ],
)
def test_a_bad_preset_is_refused(make_admission, name, calibration, said):
    with pytest.raises(PresetError) as caught:
        make_admission(presets={name: calibration})
    assert str(caught.value).startswith(f"preset {name!r}: ")
    assert said in str(caught.value)
