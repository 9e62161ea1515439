import asyncio

import pytest

from server.profiling.gift import Plan, search
from server.profiling.search import SearchFailed
from tests.server.profiling.worlds import searched

LAYERS = 6


def course(accuracy, **plan):
    """A search over scores that are a function of saliency layer and alpha; 0.5 plainly."""

    def score(stage, calibration):
        found = 0.5 if calibration is None else accuracy(*map(calibration.get, NAMES))
        return {"accuracy": found, "valid": 1.0}

    return asyncio.run(searched(search(Plan(LAYERS, **plan)), score))


NAMES = "saliency_layer", "alpha"


def helping(layer, alpha=5.0):
    """One layer helps most, at one strength."""
    return lambda at, strength: 0.5 + 0.1 * (at == layer) * (1 - abs(strength - alpha) / 10)


def test_the_layer_that_helps_is_found_and_its_strength_swept():
    found = course(helping(4, alpha=3.0))

    assert found.choice.parameters == {"saliency_layer": 4, "alpha": 3.0}
    assert [scored.stage.name for scored in found.stages] == ["probe", "sweep"]
    assert found.choice.remarks == ("1 of 6 layers beat the baseline.",)


def test_every_layer_is_probed_beside_the_baseline():
    stage = course(helping(4), probe=2.0).stages[0].stage

    assert [candidate.calibration for candidate in stage.candidates] == [
        None,
        *({"method": "gift", "saliency_layer": layer, "alpha": 2.0} for layer in range(LAYERS)),
    ]


def test_of_equal_layers_that_nearest_to_a_third_of_the_depth_is_taken():
    assert course(lambda layer, _: 0.6).choice.parameters["saliency_layer"] == 2
    found = course(lambda layer, _: 0.6 if layer in (0, 3, 5) else 0.5)
    assert found.choice.parameters["saliency_layer"] == 3


def test_of_equal_strengths_the_mildest_is_taken():
    assert course(lambda layer, _: 0.6, grid=(2.0, 4.0)).choice.parameters["alpha"] == 2.0


def test_where_nothing_helps_the_least_bad_is_taken_and_told():
    found = course(lambda layer, alpha: 0.5 - 0.01 * alpha * (1 + (layer != 5)))

    assert found.choice.parameters == {"saliency_layer": 5, "alpha": 1.0}
    assert found.choice.remarks[0] == "0 of 6 layers beat the baseline."
    assert found.choice.remarks[1].startswith("No alpha was better than the baseline")


def test_without_any_change_there_is_nothing_to_choose():
    with pytest.raises(SearchFailed, match="no probe changed any score"):
        course(lambda layer, alpha: 0.5)
