"""The search of ZeroTuning: which query heads, then one gamma for all of them.

Each head is probed with a gamma above 1 in all layers. It is up-effective if the score rises and
down-effective if it falls. Heads of the type that has more of them are tuned, those with the
largest effect first, with gammas on the side that suits the type.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from server.profiling.search import (
    ACCURACY,
    BASELINE,
    ENTROPY,
    Candidate,
    Choice,
    Gain,
    Objective,
    Search,
    SearchFailed,
    Stage,
    nothing,
)

GRID = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.25, 1.5, 2.0, 2.5, 3.0, 3.5, 4.5, 5.5, 6.5)
PROBE = 2.0
TOP = 0.4


@dataclass(frozen=True, slots=True)
class Plan:
    """What to search.

    Attributes:
        heads: query heads of a layer.
        probe: gamma that every head is probed with, above 1.
        top: largest share of all heads that are tuned, above 0 up to 1.
        grid: gammas to choose from.
        unsupervised: judge by the entropy of the next token in place of answers.
    """

    heads: int
    probe: float = PROBE
    top: float = TOP
    grid: tuple[float, ...] = GRID
    unsupervised: bool = False

    @property
    def objective(self) -> Objective:
        """What makes a candidate better than another."""
        return ENTROPY if self.unsupervised else ACCURACY


def search(plan: Plan) -> Search:
    """Probe every head, then sweep gamma over the chosen ones.

    Raises:
        SearchFailed: no head has an effect, or the grid has nothing on their side.
    """
    objective = plan.objective
    probes = tuple(_candidate(f"head {h}", plan.probe, [h]) for h in range(plan.heads))
    baseline, *probed = yield Stage("probe", objective.asked, (BASELINE, *probes))
    effects = [objective.gain(score, baseline) for score in probed]
    heads, rises = _dominant(effects, plan)
    gammas = [gamma for gamma in plan.grid if (gamma > 1) == rises and gamma != 1]
    kind = f"{'up' if rises else 'down'}-effective"
    if not gammas:
        side = "above" if rises else "below"
        raise SearchFailed(f"--grid has no gamma {side} 1, and most heads are {kind}")
    sweep = tuple(_candidate(f"gamma {gamma:g}", gamma, heads) for gamma in gammas)
    swept = yield Stage("sweep", objective.asked, sweep)
    gains = [objective.gain(score, baseline) for score in swept]
    # Of equal ones the mildest.
    best = max(range(len(gammas)), key=lambda i: (gains[i], -abs(math.log(gammas[i]))))
    remarks = [f"{_listed(heads)} of {plan.heads} are tuned: {kind}, with the largest effects."]
    if gains[best] <= nothing(gains[best]):
        remarks.append("No gamma was better than the baseline on the search samples, either.")
    return Choice({"gamma": gammas[best], "heads": heads}, tuple(remarks))


def _candidate(label: str, gamma: float, heads: list[int]) -> Candidate:
    return Candidate(label, {"method": "zerotuning", "gamma": gamma, "heads": heads})


def _dominant(effects: Sequence[Gain], plan: Plan) -> tuple[list[int], bool]:
    """Heads to tune, ascending, and whether they are up-effective.

    A head without any effect is of neither type. Where both types have as many heads, the sum of
    their effects decides.
    """
    zero = nothing(effects[0])
    rising = [head for head, effect in enumerate(effects) if effect > zero]
    falling = [head for head, effect in enumerate(effects) if effect < zero]
    if not rising and not falling:
        raise SearchFailed(
            "no probe changed any score; more --samples, another --probe-gamma or "
            "--scoring logprob may show effects"
        )
    total = tuple(map(sum, zip(*effects, strict=True)))
    rises = (len(rising), total) > (len(falling), zero)
    ranked = sorted(rising if rises else falling, key=effects.__getitem__, reverse=rises)
    count = max(1, round(plan.top * plan.heads))
    return sorted(ranked[:count]), rises


def _listed(heads: Sequence[int]) -> str:
    return f"Query head{'s' if len(heads) > 1 else ''} {', '.join(map(str, heads))}"
