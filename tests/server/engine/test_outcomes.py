import numpy as np
import pytest

from calibrators.interface import LayerPlan, Skip
from server.engine.outcomes import Outcomes
from server.engine.payload import Tally

HEADS = np.array([True, False, True])


def plan(**changes):
    return LayerPlan(HEADS, **changes)


@pytest.fixture
def tally():
    return Tally()


@pytest.fixture
def outcomes(tally):
    return Outcomes(tally, chooses_heads=True)


def test_layers_add_up_and_a_layer_resolved_again_counts_once(outcomes, tally):
    outcomes.note(1, plan(statistics={"sinks": 2}))
    outcomes.note(2, plan(statistics={"sinks": 5, "words": 1}))
    outcomes.note(1, plan(statistics={"sinks": 3}))
    assert tally.layer_sums == {"sinks": 8.0, "words": 1.0}
    assert tally.layer_counts == {"sinks": 2, "words": 1}
    assert tally.heads == 4
    outcomes.note(2, None)
    assert (tally.layer_sums, tally.heads) == ({"sinks": 3.0}, 2)


def test_heads_are_counted_only_where_they_are_chosen(tally):
    Outcomes(tally, chooses_heads=False).note(1, plan())
    assert tally.heads is None


def test_details_are_shown_by_layer_in_order(outcomes, tally):
    outcomes.note(10, plan(details={"heads_selected": [1]}))
    outcomes.note(9, plan(details={"heads_selected": [0, 2]}))
    assert list(tally.details["heads_selected"].items()) == [("9", [0, 2]), ("10", [1])]
    outcomes.note(9, plan())
    assert tally.details == {"heads_selected": {"10": [1]}}


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ([], None),
        ([None], None),
        ([Skip("no word")], "no word"),
        ([None, Skip("no word"), Skip("no word", plan())], "no word"),
        ([Skip("no word"), plan()], None),
        ([plan(), None], None),
    ],
)
def test_a_method_is_skipped_where_it_is_in_every_layer_it_takes_part_in(
    outcomes, tally, found, reason
):
    for layer, outcome in enumerate(found):
        outcomes.note(layer, outcome)
    assert tally.skipped == reason


def test_more_of_the_prompt_ends_a_skip(outcomes, tally):
    outcomes.note(1, Skip("no sink", plan(statistics={"sinks": 0})))
    assert tally.layer_sums == {"sinks": 0}
    outcomes.note(1, plan(statistics={"sinks": 2}))
    assert (tally.skipped, tally.layer_sums) == (None, {"sinks": 2.0})


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"statistics": {"sinks": float("nan")}}, ValueError),
        ({"details": {"heads": np.array([1])}}, TypeError),
        ({"details": {"heads": [float("inf")]}}, ValueError),
    ],
)
def test_what_cannot_travel_raises(outcomes, changes, error):
    with pytest.raises(error):
        outcomes.note(0, plan(**changes))
