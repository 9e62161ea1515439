import asyncio

import pytest

from server.profiling.search import SearchFailed
from server.profiling.zerotuning import Plan, search
from tests.server.profiling.worlds import searched, strength


def course(effects, of=lambda s: {"accuracy": 0.5 + s, "valid": 1.0}, **plan):
    def score(stage, calibration):
        return of(strength(calibration, effects))

    return asyncio.run(searched(search(Plan(heads=9, **plan)), score))


def test_a_planted_head_is_found_with_its_gamma():
    found = course({5: 0.2})

    assert found.choice.parameters == {"gamma": 3.5, "heads": [5]}
    assert [scored.stage.name for scored in found.stages] == ["probe", "sweep"]


def test_every_head_is_probed_by_itself_beside_the_baseline():
    stage = course({5: 0.2}).stages[0].stage

    assert [candidate.calibration for candidate in stage.candidates] == [
        None,
        *({"method": "zerotuning", "gamma": 2.0, "heads": [head]} for head in range(9)),
    ]


def test_heads_that_lose_by_the_probe_are_tuned_below_1():
    found = course({1: -0.1, 2: -0.2, 7: 0.3})

    assert found.choice.parameters["heads"] == [1, 2]
    assert found.choice.parameters["gamma"] < 1
    assert all(c.calibration["gamma"] < 1 for c in found.stages[1].stage.candidates)


def test_heads_of_the_other_type_are_left_alone():
    assert course({0: 0.01, 1: 0.02, 2: 0.03, 8: -0.3}).choice.parameters["heads"] == [0, 1, 2]


def test_as_many_heads_of_both_types_are_told_apart_by_the_sum_of_their_effects():
    assert course({0: 0.1, 1: -0.2}).choice.parameters["heads"] == [1]
    assert course({0: 0.2, 1: -0.1}).choice.parameters["heads"] == [0]


@pytest.mark.parametrize(("top", "heads"), [(0.4, [5, 6, 7, 8]), (0.1, [8]), (0.01, [8])])
def test_the_top_share_has_the_largest_effects(top, heads):
    effects = {head: (head + 1) / 100 for head in range(9)}

    assert course(effects, top=top).choice.parameters["heads"] == heads
    harm = {head: -effect for head, effect in effects.items()}
    assert course(harm, top=top).choice.parameters["heads"] == heads


def test_margins_decide_between_equal_accuracies():
    found = course({3: 0.2}, of=lambda s: {"accuracy": 0.5, "valid": 1.0, "margin": s})

    assert found.choice.parameters == {"gamma": 3.5, "heads": [3]}


def test_accuracy_comes_before_margins():
    found = course({3: 0.2}, of=lambda s: {"accuracy": 0.5 + s, "valid": 1.0, "margin": -s})

    assert found.choice.parameters == {"gamma": 3.5, "heads": [3]}


def test_of_equal_gammas_the_mildest_is_taken():
    found = course({3: 0.2}, of=lambda s: {"accuracy": float(s > 0), "valid": 1.0})

    assert found.choice.parameters["gamma"] == 1.25


def test_without_answers_the_lowest_entropy_decides():
    found = course({4: 0.5}, of=lambda s: {"entropy": 2.0 - s}, unsupervised=True)

    assert found.choice.parameters == {"gamma": 3.5, "heads": [4]}
    assert {scored.stage.asked for scored in found.stages} == {"entropy"}


def test_a_sweep_that_only_loses_is_told():
    # Every gamma of this grid is far beyond the best.
    found = course({3: 0.2}, grid=(20.0, 50.0))

    assert found.choice.parameters["gamma"] == 20.0
    assert "No gamma was better" in found.choice.remarks[-1]
    assert len(course({3: 0.2}).choice.remarks) == 1


def test_without_any_effect_there_is_nothing_to_choose():
    with pytest.raises(SearchFailed, match="no probe changed any score"):
        course({})


def test_a_grid_without_gammas_on_the_side_that_is_needed():
    with pytest.raises(SearchFailed, match="no gamma below 1"):
        course({3: -0.2}, grid=(1.0, 2.0))
