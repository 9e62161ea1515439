import copy
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibrators.act import ACT
from calibrators.capabilities import alternatives, profile_settings
from calibrators.interface import CalibrationError
from calibrators.profiles import MAX_DEPTH, ModelIdentity, Profile, ProfileError, load, save
from calibrators.zerotuning import ZeroTuning

STRENGTHS = {"1": {"0": 0.5, "5": 2}, "3": {"2": 0.25}}
OWN = {"parameters": {}, "strengths": STRENGTHS}


@pytest.fixture
def write(tmp_path):
    """A file with a profile's content; bytes and text go in as they are."""

    def make(content, name="calm.json"):
        path = tmp_path / name
        if not isinstance(content, (bytes, str)):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


@pytest.fixture
def refusal(write):
    def of(content, name="calm.json"):
        with pytest.raises(ProfileError) as caught:
            load(write(content, name))
        return caught.value

    return of


def changed(content, path, value):
    """A copy in which the field at a dotted path has another value, or none."""
    copied = copy.deepcopy(content)
    *parents, last = path.split(".")
    at = copied
    for name in parents:
        at = at[name]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return copied


def paths(content, prefix=""):
    for name, value in content.items():
        yield prefix + name
        if isinstance(value, dict) and name not in ("parameters", "search"):
            yield from paths(value, f"{prefix}{name}.")


@pytest.mark.parametrize("fields", [{}, OWN, {"method": "act", "parameters": {"beta": None}}])
def test_what_is_saved_is_loaded(make_profile, tmp_path, fields):
    profile = make_profile(**fields)
    path = tmp_path / "calm.json"
    save(profile, path)
    assert load(path) == profile
    assert [each.name for each in tmp_path.iterdir()] == ["calm.json"]


def test_a_file_is_written_the_same_way_whatever_the_order(profile_content, tmp_path):
    def text(content):
        path = tmp_path / "calm.json"
        save(Profile.model_validate(content), path)
        return path.read_text()

    def turned(value):
        if isinstance(value, dict):
            return {name: turned(value[name]) for name in reversed(value)}
        return value

    strengths = {str(layer): {"2": 1.5, "10": 0.5} for layer in (2, 10)}
    content = profile_content(parameters={"b": 1, "a": {"d": 1, "c": 2}}, strengths=strengths)
    assert text(content) == text(turned(content))
    written = json.loads(text(content))
    assert list(written) == list(Profile.model_fields)
    assert list(written["parameters"]["a"]) == ["c", "d"]
    assert list(written["strengths"]) == ["2", "10"]
    assert list(written["strengths"]["2"]) == ["2", "10"]
    assert "strengths" not in json.loads(text(profile_content()))


def test_a_write_that_fails_leaves_the_old_file(make_profile, tmp_path, monkeypatch):
    path = tmp_path / "calm.json"
    save(make_profile(), path)
    before = path.read_text()

    def fail(descriptor):
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        save(make_profile(**OWN), path)
    assert path.read_text() == before
    assert [each.name for each in tmp_path.iterdir()] == ["calm.json"]


def test_the_file_is_named_after_the_profile(make_profile, profile_content, refusal, tmp_path):
    error = refusal(profile_content(), "other.json")
    assert (error.file, error.field) == ("other.json", "name")
    assert str(error) == "other.json: name: calm belongs into calm.json"
    with pytest.raises(ProfileError, match="calm belongs into"):
        save(make_profile(), tmp_path / "another.json")
    assert not (tmp_path / "another.json").exists()


WRONG = [
    ("format", 2),
    ("format", True),
    ("format", 1.0),
    ("name", "Calm"),
    ("name", "-calm"),
    ("name", "a/b"),
    ("name", "calm\n"),
    ("model.config_hash", "c0"),
    ("model.layers", "4"),
    ("model.layers", 0),
    ("model.query_heads", 6.5),
    ("method", 1),
    ("parameters", []),
    ("provenance.data.sha256", "D1" * 32),
    ("provenance.split.report", 0),
    ("provenance.split.seed", -1),
    ("provenance.confidence", 1),
    ("provenance.confidence", "0.95"),
    ("provenance.baseline.low", True),
    ("provenance.date", "25.11.2026"),
    ("provenance.date", "20261125"),
    ("provenance.search", None),
]


@pytest.mark.parametrize(("path", "value"), WRONG)
def test_a_wrong_value_is_refused_by_its_path(profile_content, refusal, tmp_path, path, value):
    error = refusal(changed(profile_content(), path, value))
    assert (error.file, error.field) == ("calm.json", path)
    assert str(error).startswith(f"calm.json: {path}: ")
    assert str(tmp_path) not in str(error)


@pytest.mark.parametrize(
    ("strengths", "field"),
    [
        ({}, "strengths"),
        ({"1": {}}, "strengths.1"),
        ({"1": {"0": "1"}}, "strengths.1.0"),
        ({"1": {"0": True}}, "strengths.1.0"),
        ({"01": {"0": 1}}, "strengths.01"),
        ({"-1": {"0": 1}}, "strengths.-1"),
        ({"1": {"x": 1}}, "strengths.1.x"),
        ([1], "strengths"),
    ],
)
def test_strengths_are_numbers_by_layer_and_head(profile_content, refusal, strengths, field):
    error = refusal(profile_content(parameters={}, strengths=strengths))
    assert error.field.removesuffix(".[key]") == field


def test_every_field_is_needed_and_no_other_is_known(profile_content, refusal):
    content = profile_content()
    for path in paths(content):
        assert refusal(changed(content, path, ...)).field == path
        parent = path.rpartition(".")[0]
        unknown = f"{parent}.extra" if parent else "extra"
        assert refusal(changed(content, unknown, 1)).field == unknown


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"parameters": {"method": "act"}}, "leave out method"),
        ({"parameters": {"profile": "b"}}, "leave out profile"),
        ({"parameters": {"strengths": {}}}, "leave out strengths"),
        (OWN | {"parameters": {"layers": "all"}}, "leave out layers"),
        (OWN | {"parameters": {"heads": [1]}}, "leave out heads"),
    ],
)
def test_nothing_is_said_twice(profile_content, refusal, fields, said):
    assert said in refusal(profile_content(**fields)).message


def test_an_interval_holds_its_value(profile_content, refusal):
    for low, high in ((0.63, 0.7), (0.5, 0.6), (0.7, 0.5)):
        estimate = {"value": 0.62, "low": low, "high": high}
        error = refusal(changed(profile_content(), "provenance.baseline", estimate))
        assert error.field == "provenance.baseline"
        assert error.message == "low <= value <= high must hold"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400"])
@pytest.mark.parametrize("field", ["parameters.gamma", "provenance.search.grid"])
def test_numbers_are_finite_wherever_they_stand(profile_content, refusal, number, field):
    text = json.dumps(changed(profile_content(), field, "HERE")).replace('"HERE"', number)
    error = refusal(text)
    assert number in str(error) or error.field.startswith(field)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff", "not JSON"),
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"name": "a", "name": "b"}', "the key 'name' comes twice"),
        ('{"x": "\\ud800"}', "not JSON"),
        ("[]", "valid dictionary"),
    ],
)
def test_what_is_no_profile_at_all(refusal, content, said):
    assert said in str(refusal(content))


def test_free_objects_are_not_deep(profile_content, refusal):
    deep = 0
    for _ in range(MAX_DEPTH):
        deep = [deep]
    assert "nested" in refusal(profile_content(parameters={"x": deep})).message


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ProfileError, match=r"^none\.json: it cannot be read: No such file"):
        load(tmp_path / "none.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@given(st.data())
def test_any_value_anywhere_is_taken_or_refused_by_name(profile_content, tmp_path_factory, data):
    content = profile_content(strengths=STRENGTHS, parameters={})
    field = data.draw(st.sampled_from(list(paths(content))))
    path = tmp_path_factory.mktemp("profile") / "calm.json"
    path.write_text(json.dumps(changed(content, field, data.draw(JSON))))
    try:
        profile = load(path)
    except ProfileError as error:
        assert error.file == "calm.json"
        assert str(path.parent) not in str(error)
    else:
        save(profile, path)
        assert load(path) == profile


def test_a_profile_for_another_model_names_both(make_profile, make_facts):
    profile = make_profile()
    profile.check_model(make_facts())
    changes = [
        {"config_hash": "ab" * 32},
        {"config_hash": ""},
        {"architecture": "Qwen2ForCausalLM"},
        {"layers": 5},
        {"query_heads": 7},
    ]
    for change in changes:
        with pytest.raises(ProfileError) as caught:
            profile.check_model(make_facts(**change))
        message = str(caught.value)
        assert message.startswith("calm.json: model: it is for LlamaForCausalLM with 4 layers of 6")
        shown = str(next(iter(change.values())))[:12] or "unknown configuration"
        assert shown in message.partition("the model is")[2]


def test_identity_is_read_from_facts(make_profile, make_facts):
    assert ModelIdentity.of(make_facts()) == make_profile().model
    with pytest.raises(ValueError, match="config_hash"):
        ModelIdentity.of(make_facts(config_hash=""))


def completed(profile, method, facts, **given):
    """What a request of a method makes of a profile, bound."""
    merged = profile.settings({"method": method.name, "profile": profile.name, **given})
    return method.bind(profile_settings(method).model_validate(merged), facts)


@pytest.mark.parametrize(
    ("given", "params"),
    [
        ({}, {"gamma": 0.5, "layers": [1, 3], "heads": [0, 2]}),
        ({"gamma": None, "layers": None}, {"gamma": 0.5, "layers": [1, 3], "heads": [0, 2]}),
        ({"gamma": 2}, {"gamma": 2.0, "layers": [1, 3], "heads": [0, 2]}),
        ({"layers": "all"}, {"gamma": 0.5, "layers": "all", "heads": [0, 2]}),
        ({"layers": [0]}, {"gamma": 0.5, "layers": [0], "heads": [0, 2]}),
        ({"heads": "all"}, {"gamma": 0.5, "layers": [1, 3], "heads": "all"}),
        ({"heads": {"2": [5]}}, {"gamma": 0.5, "layers": [2], "heads": [5]}),
    ],
    ids=str,
)
def test_a_request_wins_over_its_profile(make_profile, make_facts, given, params):
    assert completed(make_profile(), ZeroTuning(), make_facts(), **given).params == params


def test_layers_narrow_heads_by_layer(make_profile, make_facts):
    heads = {"1": [0, 5], "3": [2]}
    profile = make_profile(parameters={"gamma": 0.5, "heads": heads})
    bound = completed(profile, ZeroTuning(), make_facts(), layers=[0, 3])
    assert bound.params == {"gamma": 0.5, "layers": [3], "heads": [2]}
    with pytest.raises(CalibrationError, match="which layers leaves out"):
        completed(profile, ZeroTuning(), make_facts(), layers=[0])


@pytest.mark.parametrize(
    ("own", "given", "expected"),
    [
        ({"alpha": 7, "threshold": None}, {}, (7, None)),
        ({"alpha": 7}, {"threshold": 0.2}, (None, 0.2)),
        ({"alpha": None, "threshold": 0.1}, {"alpha": 3}, (3, None)),
        ({"threshold": 0.1}, {"beta": 0.2}, (None, 0.1)),
    ],
)
def test_one_of_two_that_exclude_each_other_replaces_both(
    make_profile, make_facts, own, given, expected
):
    act = ACT()
    profile = make_profile(method="act", parameters=own)
    settings = act.Settings.model_validate(profile.settings(given, alternatives(act)))
    params = act.bind(settings, make_facts()).params
    assert (params["alpha"], params["threshold"]) == expected


def test_reading_profiles_needs_neither_torch_nor_vllm():
    code = "import sys, calibrators.profiles; print(*{'torch', 'numpy', 'vllm'} & set(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert loaded.stdout.split() == []
