import json
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibrators import registry
from calibrators.interface import (
    Bound,
    CalibrationError,
    ColumnMeans,
    HeadOutputs,
    ModelFacts,
    Prefill,
    ProbabilityBlock,
    ResidualPeaks,
    Span,
)
from server.admission import MAX_KEYS, REASONS, Admission, Admitted, Refusal

FACTS = ModelFacts("LlamaForCausalLM", 4, 6, 2, 32, 192, 512)
ADMISSION = Admission(registry.load(), FACTS, "model")
KEY = b"secret"


@pytest.fixture
def make_admission(make_facts, make_calibrator):
    """Admission with fakes: `weights` and `other` reweight, `heads` and `more` scale heads."""

    def make(*more, facts=None, **options):
        fakes = [
            make_calibrator("weights"),
            make_calibrator("other"),
            make_calibrator("heads", reweights=False),
            make_calibrator("more", reweights=False),
            make_calibrator("vision", title="Seeing", modality="vision"),
            *more,
        ]
        return Admission({c.name: c for c in fakes}, facts or make_facts(), "model", **options)

    return make


def refused(field, admission=ADMISSION):
    with pytest.raises(Refusal) as caught:
        admission.admit(field)
    assert caught.value.reason in REASONS
    return caught.value


@pytest.mark.parametrize("field", [None, "none"])
def test_plain_requests(field):
    assert ADMISSION.admit(field) is None


@pytest.mark.parametrize(
    "field",
    [
        {"method": "zerotuning", "gamma": 0.6},
        {"method": "zerotuning", "gamma": 0.6, "layers": "all", "heads": "all", "profile": None},
        [{"method": "zerotuning", "gamma": 0.6}],
    ],
)
def test_forms_of_one_calibration(field):
    admitted = ADMISSION.admit(field)
    params = {"gamma": 0.6, "layers": "all", "heads": "all"}
    assert admitted.bounds == (Bound("zerotuning", params, 4, 24),)
    assert admitted.digest == ADMISSION.admit({"method": "zerotuning", "gamma": 0.6}).digest
    assert (admitted.touches_prompt_kv, admitted.shareable) == (True, True)
    assert re.fullmatch("zerotuning;digest=[0-9a-f]{12}", admitted.header)
    assert admitted.digest.startswith(admitted.short_digest)


def test_a_name_alone_takes_the_defaults(make_admission):
    admitted = make_admission().admit("weights")
    assert admitted.bounds[0].params == {"strength": 1.0}
    assert refused("zerotuning").param == "calibration.gamma"


@pytest.mark.parametrize(
    ("field", "reason", "param", "said"),
    [
        (True, "malformed", "calibration", "calibration is a boolean"),
        (1, "malformed", "calibration", "calibration is a number"),
        (float("nan"), "malformed", "calibration", "calibration is a number"),
        ([], "malformed", "calibration", "lists 0 calibrations; 1 to 2 are allowed"),
        (["a"] * 3, "malformed", "calibration", "lists 3 calibrations; 1 to 2 are allowed"),
        ([["zerotuning"]], "malformed", "calibration[0]", "is a list"),
        ({}, "malformed", "calibration.method", 'needs the key "method"'),
        ({"method": None}, "malformed", "calibration.method", 'needs the key "method"'),
        ({"method": 1}, "malformed", "calibration.method", 'needs the key "method"'),
        ("", "unknown_method", "calibration", "no calibrator ''; this server offers: act, "),
        ("zero", "unknown_method", "calibration", "no calibrator 'zero'"),
        ({"method": "zero"}, "unknown_method", "calibration.method", "no calibrator 'zero'"),
        ([{"method": "zero"}], "unknown_method", "calibration[0].method", "'zero'"),
        (["none"], "unknown_method", "calibration[0]", "no calibrator 'none'"),
    ],
)
def test_what_is_no_calibration(field, reason, param, said):
    refusal = refused(field)
    assert (refusal.reason, refusal.param, refusal.method) == (reason, param, None)
    assert said in refusal.message


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({}, "gamma", ["gamma is required", "0 < gamma <= 100"]),
        ({"gamma": 0}, "gamma", ["is 0", "greater than 0"]),
        ({"gamma": 101}, "gamma", ["is 101", "less than or equal to 100"]),
        ({"gamma": float("nan")}, "gamma", ["is nan", "finite number"]),
        ({"gamma": float("inf")}, "gamma", ["is inf", "finite number"]),
        ({"gamma": True}, "gamma", ["is True", "valid number"]),
        ({"gamma": "0.6"}, "gamma", ["is '0.6'", "valid number"]),
        ({"gamma": 10**400}, "gamma", ["valid number", "0 < gamma <= 100"]),
        ({"gamma": [1]}, "gamma", ["is [1]", "valid number"]),
        ({"gamma": 1, "layers": [4]}, "layers", ["index 4", "4 layers: 0 to 3"]),
        ({"gamma": 1, "layers": [-1]}, "layers", ["is [-1]", "greater than or equal to 0"]),
        ({"gamma": 1, "layers": [0, 0]}, "layers", ["is [0, 0]", "must be distinct"]),
        ({"gamma": 1, "layers": []}, "layers", ["is []", "at least 1"]),
        ({"gamma": 1, "layers": [True]}, "layers", ["is [True]", "valid integer"]),
        ({"gamma": 1, "layers": 3}, "layers", ["is 3", '"all" or a list of distinct']),
        ({"gamma": 1, "layers": [10**30]}, "layers", ["4 layers: 0 to 3"]),
        ({"gamma": 1, "heads": [6]}, "heads", ["index 6", "6 query heads: 0 to 5"]),
        ({"gamma": 1, "heads": {"1": [-1]}}, "heads", ["{'1': [-1]}", "greater than or equal"]),
        ({"gamma": 1, "heads": {"x": [1]}}, "heads", ["{'x': [1]}", "{layer: [heads]}"]),
        ({"gamma": 1, "heads": [0] * 5000}, "heads", ["at most 1024 items"]),
        (
            {"gamma": 1, "gama": 2},
            "gama",
            ["no parameter 'gama'", "it has gamma, layers, heads, profile"],
        ),
        ({"gamma": 1, "profile": "A"}, "profile", ["is 'A'", "match pattern"]),
        ({"gamma": 1, "profile": ["a"]}, "profile", ["is ['a']", "valid string"]),
    ],
)
@pytest.mark.parametrize("place", ["object", "list"])
def test_what_a_method_does_not_take(fields, param, said, place):
    entry = {"method": "zerotuning", **fields}
    refusal = refused(entry if place == "object" else [entry])
    where = "calibration" if place == "object" else "calibration[0]"
    assert (refusal.reason, refusal.method) == ("invalid_parameter", "zerotuning")
    assert refusal.param == f"{where}.{param}"
    for words in said:
        assert words in refusal.message


def test_the_second_of_a_list_is_named(make_admission):
    refusal = refused([{"method": "weights"}, {"method": "heads", "strength": 9}], make_admission())
    assert (refusal.param, refusal.method) == ("calibration[1].strength", "heads")


def test_an_error_of_the_whole_method_names_no_field_below_it(make_admission, make_calibrator):
    def bind(self, settings, facts):
        raise CalibrationError("", "not on a Tuesday")

    refusal = refused("moody", make_admission(make_calibrator("moody", bind=bind)))
    assert (refusal.param, refusal.message) == ("calibration", "not on a Tuesday")


def test_vision_methods_need_a_vision_model(make_admission, make_facts):
    refusal = refused("vision", make_admission())
    assert (refusal.reason, refusal.method) == ("unsupported_model", "vision")
    assert "Seeing needs a model that takes images" in refusal.message
    admission = make_admission(facts=make_facts(modality="vision"))
    assert admission.admit("vision").methods == ("vision",)
    assert admission.unavailable(admission.calibrators["vision"]) is None


@pytest.fixture
def observing(make_calibrator):
    """A calibrator that observes, and how it has its prompt cut."""

    def make(*observations, prefill=Prefill.WHOLE, **attributes):
        return make_calibrator(
            "needy",
            observe=lambda self, bound, prompt: observations,
            prefill=lambda self, bound: prefill,
            **attributes,
        )

    return make


BLOCK = ProbabilityBlock(0, (), (Span(0, 0),))
IN_TIME = [
    (ColumnMeans(0), (Prefill.WHOLE,)),
    (BLOCK, (Prefill.SPLIT_LAST,)),
    (HeadOutputs(0), (Prefill.WHOLE, Prefill.SPLIT_LAST)),
    (ResidualPeaks(0, (1,)), tuple(Prefill)),
]


@pytest.mark.parametrize("policy", Prefill)
@pytest.mark.parametrize(("observation", "policies"), IN_TIME, ids=str)
def test_what_is_known_in_time_is_admitted(
    make_admission, observing, observation, policies, policy
):
    admission = make_admission(observing(observation, prefill=policy))
    if policy in policies:
        assert admission.admit("needy").prefill.policy is policy
    else:
        refusal = refused("needy", admission)
        assert (refusal.reason, refusal.method) == ("unsupported_feature", "needy")
        assert "not known in time" in refusal.message


def test_layers_to_be_seen_without_images_are_known_beforehand(make_admission, observing):
    seen = [HeadOutputs(layer, without_images=layer != 1) for layer in (3, 1, 0)]
    admitted = make_admission(observing(*seen)).admit("needy")
    assert admitted.text_layers == (0, 3)
    assert make_admission(observing(HeadOutputs(0))).admit("needy").text_layers == ()


def test_peaks_of_cached_kv_that_all_share_are_refused(make_admission, observing):
    peaky = observing(ResidualPeaks(0, (1,)), prefill=Prefill.ANY, touches_prompt_kv=False)
    refusal = refused("needy", make_admission(peaky))
    assert (refusal.reason, refusal.method) == ("unsupported_feature", "needy")
    assert "cached KV" in refusal.message


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["weights", "weights"], "weights and weights both change attention weights"),
        (["weights", "other"], "weights and other both change attention weights"),
        (["heads", "more"], "heads and more both scale heads"),
    ],
)
def test_one_method_of_each_kind(make_admission, names, what):
    refusal = refused(names, make_admission())
    assert (refusal.reason, refusal.param) == ("combination", "calibration")
    assert what in refusal.message
    assert refusal.method == names[1]


def test_weights_come_before_heads_in_whatever_order_they_are_named(make_admission):
    admission = make_admission()
    one, other = admission.admit(["weights", "heads"]), admission.admit(["heads", "weights"])
    assert one.methods == other.methods == ("weights", "heads")
    assert one.digest == other.digest
    assert one.header.startswith("weights+heads;digest=")


def test_the_limit_is_the_operators(make_admission):
    assert make_admission(limit=1).admit(["weights"]).methods == ("weights",)
    assert "1 to 1 are allowed" in refused(["weights", "heads"], make_admission(limit=1)).message


def test_what_the_methods_declare_is_combined(make_admission, make_calibrator):
    admission = make_admission(
        make_calibrator("acausal", causal=False, reweights=False),
        make_calibrator("late", touches_prompt_kv=False),
        make_calibrator("last", touches_prompt_kv=False, reweights=False),
    )

    def declared(*names):
        admitted = admission.admit([*names])
        return admitted.touches_prompt_kv, admitted.shareable

    assert declared("weights", "heads") == (True, True)
    assert declared("weights", "acausal") == (True, False)
    assert declared("late", "heads") == (True, True)
    assert declared("late", "last") == (False, True)


def test_the_default_and_its_off_switch(make_admission):
    admission = make_admission(default={"method": "weights", "strength": 2})
    assert admission.admit(None).bounds[0].params == {"strength": 2.0}
    assert admission.admit("none") is None
    assert admission.admit("heads").methods == ("heads",)
    assert make_admission(default="none").admit(None) is None


def test_a_default_that_makes_no_sense_is_refused_at_once(make_admission):
    with pytest.raises(Refusal, match="no parameter 'x'"):
        make_admission(default={"method": "weights", "x": 1})


def test_the_digest_depends_on_model_and_revision(make_facts, make_calibrator):
    def digest(model="model", **attributes):
        calibrators = {"m": make_calibrator("m", **attributes)}
        return Admission(calibrators, make_facts(), model).admit("m").digest

    assert len({digest(), digest("another"), digest(revision=2)}) == 3
    assert digest() == digest(title="renamed")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(10**300, 10**310)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["all", "none", "zerotuning", "\ud800", "\x00", "9" * 200]),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(
            st.text(max_size=5) | st.sampled_from(["0", "3", "01"]), inner, max_size=5
        )
    ),
    max_leaves=12,
)
OBJECTS = st.fixed_dictionaries(
    {"method": st.just("zerotuning") | JSON},
    optional={
        "gamma": st.floats() | JSON,
        "layers": JSON,
        "heads": JSON,
        "profile": JSON,
        "x": JSON,
    },
)


@given(JSON | OBJECTS | st.lists(OBJECTS, max_size=3))
def test_any_json_is_admitted_or_refused(field):
    try:
        admitted = ADMISSION.admit(field)
    except Refusal as refusal:
        assert refusal.reason in REASONS
        assert refusal.param.startswith("calibration")
        assert 0 < len(refusal.message) < 1000
        (refusal.message + refusal.param).encode()
    else:
        assert admitted is None or admitted.methods == ("zerotuning",)


def nested(depth):
    value = 0
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "fields",
    [
        {"layers": ["x"] * 1_000_000},
        {"layers": list(range(1_000_000))},
        {"heads": {str(i): [0] for i in range(300_000)}},
        {"heads": {"0": [0] * 1_000_000}},
        {str(i): 0 for i in range(300_000)},
        {"gamma": "9" * 10_000_000},
        {"gamma": int("9" * 4000)},
        {"x" * 1_000_000: 0},
        {"layers": nested(500)},
        {"x": nested(500)},
    ],
    ids=lambda fields: next(iter(fields))[:10],
)
def test_huge_values_are_refused_quickly_and_quoted_in_part(fields):
    # Of the processor, not of the clock: the machine may be busy with something else.
    began = time.thread_time()
    refusal = refused({"method": "zerotuning", **fields})
    assert time.thread_time() - began < 2
    assert len(refusal.message) < 500
    assert len(refusal.param) < 150


def test_a_value_nested_deeper_than_the_stack_is_quoted():
    assert "[[[" in refused({"method": "zerotuning", "layers": nested(20_000)}).message


def test_the_number_of_keys_is_bounded():
    fields = {f"x{i}": 0 for i in range(MAX_KEYS - 1)}
    assert refused({"method": "zerotuning", **fields}).reason == "invalid_parameter"
    refusal = refused({"method": "zerotuning", **fields, "y": 0})
    assert (refusal.reason, refusal.param) == ("malformed", "calibration")
    assert f"{MAX_KEYS + 1} keys" in refusal.message


def admitted(*, digest="d", touches=True, shareable=True):
    return Admitted((Bound("m", {}, 1, 1),), digest, touches, shareable)


TEXT = st.text(max_size=30)


@given(*[st.tuples(TEXT, TEXT, st.none() | TEXT, st.binary(min_size=1, max_size=8))] * 2)
def test_salts_are_equal_only_where_everything_is(one, other):
    salts = [
        admitted(digest=digest).cache_salt(key, tenant, user)
        for digest, tenant, user, key in (one, other)
    ]
    assert all(re.fullmatch("[0-9a-f]{64}", salt) for salt in salts)
    assert (salts[0] == salts[1]) == (one == other or _same_but_padding(one, other))


def _same_but_padding(one, other):
    """HMAC pads short keys with zero bytes."""
    return one[:3] == other[:3] and one[3].rstrip(b"\0") == other[3].rstrip(b"\0")


@pytest.mark.parametrize(
    "forged",
    [
        ("t", 'u","s'),
        ('t","u', "s"),
        ('["d","t","u"]', None),
        ("", json.dumps(["d", "t", "u"])),
    ],
)
def test_fields_cannot_run_into_each_other(forged):
    assert admitted().cache_salt(KEY, *forged) != admitted().cache_salt(KEY, "t", "u")


def test_nobody_chooses_the_salt_of_another_calibration():
    target = admitted(digest="a").cache_salt(KEY, "tenant", None)
    assert admitted(digest="b").cache_salt(KEY, "tenant", target) != target
    assert admitted(digest="a").cache_salt(KEY, "tenant", target) != target


@pytest.mark.parametrize("touches", [False, True])
def test_what_may_not_be_shared_gets_a_salt_of_its_own(touches):
    alone = admitted(touches=touches, shareable=False)
    salts = {alone.cache_salt(KEY, "t", "u") for _ in range(50)}
    assert len(salts) == 50
    assert all(re.fullmatch("[0-9a-f]{64}", salt) for salt in salts)


@pytest.mark.parametrize("user_salt", [None, "mine"])
def test_untouched_prompt_kv_is_shared_with_plain_requests(user_salt):
    assert admitted(touches=False).cache_salt(KEY, "t", user_salt) == user_salt
