from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from calibrators.interface import CalibrationError, ModelFacts
from calibrators.settings import (
    MAX_INDICES,
    CalibrationSettings,
    Heads,
    Layers,
    normal_form,
    select,
    selected_heads,
)

LAYERS, HEADS = 4, 6
FACTS = ModelFacts("LlamaForCausalLM", LAYERS, HEADS, 2, 32, 192, 512)
ALL_HEADS = tuple(range(HEADS))


class Choice(CalibrationSettings):
    method: Literal["choice"] = "choice"
    strength: Annotated[float, Field(ge=0)] = 1.0
    layers: Layers = "all"
    heads: Heads = "all"


def chosen(**fields):
    settings = Choice.model_validate(fields)
    return select(settings.layers, settings.heads, FACTS)


def indices(limit):
    return st.lists(st.integers(0, limit - 1), min_size=1, unique=True)


SELECTIONS = st.dictionaries(
    st.integers(0, LAYERS - 1), indices(HEADS).map(lambda heads: tuple(sorted(heads))), min_size=1
)


@pytest.mark.parametrize(
    ("fields", "selection"),
    [
        ({}, dict.fromkeys(range(LAYERS), ALL_HEADS)),
        ({"layers": [2, 0]}, {0: ALL_HEADS, 2: ALL_HEADS}),
        ({"heads": [5, 1]}, dict.fromkeys(range(LAYERS), (1, 5))),
        ({"layers": [3], "heads": [0]}, {3: (0,)}),
        ({"heads": {"3": [2, 0], "1": [4]}}, {1: (4,), 3: (0, 2)}),
        ({"layers": [1, 3], "heads": {3: [0]}}, {3: (0,)}),
    ],
)
def test_every_form_of_layers_and_heads(fields, selection):
    resolved = chosen(**fields)
    assert resolved == selection
    assert list(resolved) == sorted(resolved)


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"layers": [0, 4]}, "layers", "4 layers"),
        ({"heads": [6]}, "heads", "6 query heads"),
        ({"heads": {"4": [0]}}, "heads", "4 layers"),
        ({"heads": {"1": [6]}}, "heads", "in layer 1"),
        ({"layers": [1], "heads": {"1": [0], "2": [0]}}, "heads", "names layer 2"),
    ],
)
def test_what_the_model_has_not_got_is_refused_by_name(fields, param, said):
    with pytest.raises(CalibrationError, match=said) as caught:
        chosen(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layers", []),
        ("layers", [1, 1]),
        ("layers", [-1]),
        ("layers", [True]),
        ("layers", [1.0]),
        ("layers", ["1"]),
        ("layers", "some"),
        ("layers", {"1": [2]}),
        ("layers", None),
        ("layers", list(range(MAX_INDICES + 1))),
        ("heads", []),
        ("heads", {}),
        ("heads", {"1": []}),
        ("heads", {"one": [1]}),
        ("heads", {"-1": [1]}),
        ("heads", {"1.0": [1]}),
        ("heads", {"01": [1]}),
        ("heads", {"1": [1], "01": [2]}),
        ("heads", {"٣": [1]}),
        ("heads", {"1" * 5000: [1]}),
        ("heads", {"1": "all"}),
        ("heads", {str(i): [0] for i in range(MAX_INDICES + 1)}),
        ("heads", 3),
        ("strength", True),
        ("strength", "1"),
        ("strength", float("nan")),
        ("strength", float("inf")),
        ("strength", -1),
        ("strenght", 1),
        ("method", "another"),
    ],
)
def test_malformed_settings_are_refused(field, value):
    with pytest.raises(ValidationError) as caught:
        Choice.model_validate({field: value})
    assert caught.value.errors()[0]["loc"][0] == field


def test_the_limit_itself_is_allowed():
    assert len(Choice(layers=list(range(MAX_INDICES))).layers) == MAX_INDICES


@given(SELECTIONS)
def test_the_normal_form_selects_the_same(selection):
    form = normal_form(selection, FACTS)
    settings = Choice.model_validate(form)
    assert select(settings.layers, settings.heads, FACTS) == selection


@given(SELECTIONS)
def test_the_normal_form_tells_each_layer_its_heads(selection):
    form = normal_form(selection, FACTS)
    for layer in range(LAYERS):
        assert tuple(selected_heads(form, layer, FACTS)) == selection.get(layer, ())


@given(indices(LAYERS), indices(HEADS), st.randoms())
def test_spellings_of_one_selection_share_a_form(layers, heads, random):
    spelled = {str(layer): random.sample(heads, len(heads)) for layer in layers}
    shuffled = random.sample(layers, len(layers))
    forms = [
        normal_form(chosen(layers=layers, heads=heads), FACTS),
        normal_form(chosen(layers=shuffled, heads=spelled), FACTS),
        normal_form(chosen(heads=spelled), FACTS),
    ]
    assert forms[0] == forms[1] == forms[2]


def test_the_normal_form_is_short():
    everything = dict.fromkeys(range(LAYERS), ALL_HEADS)
    assert normal_form(everything, FACTS) == {"layers": "all", "heads": "all"}
    assert normal_form({2: (1,)}, FACTS) == {"layers": [2], "heads": [1]}
    assert normal_form({0: (1,), 2: (3,)}, FACTS)["heads"] == {"0": [1], "2": [3]}
