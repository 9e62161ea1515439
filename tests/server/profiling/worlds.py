"""Made-up models: what a calibration does to scores is known, so that searches can be judged."""

import math

from server.profiling.course import run


def strength(calibration, effects):
    """How strong a model is under ZeroTuning, 0 without; `effects` per head and log gamma."""
    if calibration is None:
        return 0.0
    change = math.log(calibration["gamma"])
    # Too much of it does harm, so that the best gamma is inside the grid.
    return sum(effects.get(head, 0.0) * (change - change**2 / 2.5) for head in calibration["heads"])


def sink_strength(calibration, effects):
    """The same under ACT; `effects` per (layer, head) and share taken from sinks."""
    if calibration is None:
        return 0.0
    taken = 1 - calibration["beta"]
    pairs = [(int(layer), head) for layer, heads in calibration["heads"].items() for head in heads]
    return sum(effects.get(pair, 0.0) * taken for pair in pairs)


async def searched(search, score):
    """The course of a search whose candidates `score` scores."""

    async def scored(stage):
        return [score(stage, candidate.calibration) for candidate in stage.candidates]

    return await run(search, scored)
