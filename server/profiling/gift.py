"""The search of GIFT: the layer whose saliency map helps most, then the map's strength.

Where the map is used stays what the method has for the model.
"""

from __future__ import annotations

from dataclasses import dataclass

from server.profiling.search import (
    ACCURACY,
    BASELINE,
    Candidate,
    Choice,
    Search,
    SearchFailed,
    Stage,
    nothing,
)

GRID = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
PROBE = 5.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What to search.

    Attributes:
        layers: decoder layers of the model.
        probe: alpha that every layer is probed with, above 0.
        grid: alphas to choose from.
    """

    layers: int
    probe: float = PROBE
    grid: tuple[float, ...] = GRID


def search(plan: Plan) -> Search:
    """Probe every layer as the saliency layer, sweep alpha over the best.

    Raises:
        SearchFailed: no probe changed anything.
    """
    probes = tuple(_candidate(f"layer {layer}", layer, plan.probe) for layer in range(plan.layers))
    baseline, *probed = yield Stage("probe", ACCURACY.asked, (BASELINE, *probes))
    gains = [ACCURACY.gain(score, baseline) for score in probed]
    if not any(map(any, gains)):
        raise SearchFailed(
            "no probe changed any score; more --samples, another --probe-alpha or "
            "--scoring logprob may show effects"
        )
    # Of equal ones that nearest to a third of the depth, where the method has it by default.
    third = plan.layers // 3
    layer = max(range(plan.layers), key=lambda i: (gains[i], -abs(i - third)))
    helpful = sum(gain > nothing(gain) for gain in gains)
    remarks = [f"{helpful} of {plan.layers} layers beat the baseline."]
    sweep = tuple(_candidate(f"alpha {alpha:g}", layer, alpha) for alpha in plan.grid)
    swept = yield Stage("sweep", ACCURACY.asked, sweep)
    gains = [ACCURACY.gain(score, baseline) for score in swept]
    # Of equal ones the mildest.
    best = max(range(len(sweep)), key=lambda i: (gains[i], -plan.grid[i]))
    if gains[best] <= nothing(gains[best]):
        remarks.append("No alpha was better than the baseline on the search samples.")
    return Choice({"saliency_layer": layer, "alpha": plan.grid[best]}, tuple(remarks))


def _candidate(label: str, layer: int, alpha: float) -> Candidate:
    return Candidate(label, {"method": "gift", "saliency_layer": layer, "alpha": alpha})
