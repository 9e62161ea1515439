import asyncio

import pytest

from server.profiling.act import Plan, search
from server.profiling.search import SearchFailed
from tests.server.profiling.worlds import searched, sink_strength


def masses(mass):
    """Sink masses of pairs: given ones, and little for the others."""
    return lambda layer, head: mass.get((layer, head), 0.01)


def course(effects, mass=None, **plan):
    weigh = masses(mass or {})

    def score(stage, calibration):
        if stage.asked == "sinks":
            ((layer, heads),) = calibration["heads"].items()
            return {"sink_mass": weigh(int(layer), heads[0])}
        return {"accuracy": 0.5 + sink_strength(calibration, effects), "valid": 1.0}

    return asyncio.run(searched(search(Plan(**({"layers": 6, "heads": 4} | plan))), score))


def test_planted_pairs_are_found_combined_and_swept():
    found = course({(3, 1): 0.1, (5, 0): 0.2, (4, 2): -0.3})

    assert found.choice.parameters == {"beta": 0.0, "heads": {"3": [1], "5": [0]}}
    assert [scored.stage.name for scored in found.stages] == ["screen", "probe", "sweep"]


def test_every_pair_above_the_first_layers_is_screened_on_a_few_samples():
    stage = course({(3, 1): 0.1}).stages[0].stage

    assert stage.limit == 4
    assert [c.calibration["heads"] for c in stage.candidates] == [
        {str(layer): [head]} for layer in range(2, 6) for head in range(4)
    ]


def test_pairs_with_the_heaviest_sinks_are_probed():
    found = course({(3, 1): 0.1}, {(3, 1): 0.5, (2, 0): 0.7, (5, 3): 0.6}, screen=3)

    labels = [candidate.label for candidate in found.stages[1].stage.candidates]
    assert labels == ["baseline", "layer 2, head 0", "layer 5, head 3", "layer 3, head 1"]


def test_pairs_without_sinks_are_not_probed():
    found = course({(3, 1): 0.1}, {(layer, 0): 0.0 for layer in range(2, 6)})

    assert len(found.stages[1].stage.candidates) == 1 + 12


def test_where_no_pair_helps_the_least_bad_is_taken_and_told():
    harm = {(layer, head): -0.1 for layer in range(2, 6) for head in range(4)} | {(4, 2): -0.01}
    found = course(harm)

    assert found.choice.parameters["heads"] == {"4": [2]}
    assert found.choice.parameters["beta"] == 0.8
    assert "None of 16 probed pairs" in found.choice.remarks[0]
    assert "No beta was better" in found.choice.remarks[1]


def test_alpha_is_that_of_every_candidate_and_of_the_profile():
    found = course({(3, 1): 0.1}, alpha=2.0)

    asked = [c.calibration for scored in found.stages for c in scored.stage.candidates]
    assert {calibration["alpha"] for calibration in asked if calibration} == {2.0}
    assert found.choice.parameters["alpha"] == 2.0


def test_without_sinks_there_is_nothing_to_choose():
    with pytest.raises(SearchFailed, match="no head has sinks"):
        course({}, {(layer, head): 0.0 for layer in range(2, 6) for head in range(4)})
