"""The search of VAR: which heads are selected, then how much of the sinks' attention they move.

Channels and tau are known when it begins: `streams` has looked for them, or they were given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from server.profiling.search import (
    ACCURACY,
    BASELINE,
    Candidate,
    Choice,
    Search,
    Stage,
    nothing,
)

# As the paper has it against hallucinations, in general, and for what centres on vision.
RHOS = (0.5, 0.8, 0.9)
GRID = (0.2, 0.4, 0.6, 0.8, 1.0)
PROBE = 0.6
# Of channels that are given; as the method's default has it.
TAU = 20.0
OBSERVED = 8
# Root mean squares. Of a few thousand normal numbers the largest is below 5.
PEAK = 10.0
# As the method's default has it: sinks of the layers below are left alone.
FIRST_LAYER = 2


@dataclass(frozen=True, slots=True)
class Plan:
    """What to search.

    Attributes:
        sink_dims: channels that mark sinks.
        tau: from what peak on.
        rhos: to choose from.
        probe: share that every rho is probed with.
        grid: shares to choose from.
    """

    sink_dims: tuple[int, ...]
    tau: float
    rhos: tuple[float, ...] = RHOS
    probe: float = PROBE
    grid: tuple[float, ...] = GRID


def search(plan: Plan, remarks: tuple[str, ...] = ()) -> Search:
    """Choose rho, sweep share with it.

    Where no rho changes any score, channels and tau are all that is found: a profile may be what a
    model needs for VAR at all.

    Args:
        plan: what to search.
        remarks: on how channels and tau came about.
    """
    probes = tuple(_candidate(plan, f"rho {rho:g}", rho, plan.probe) for rho in plan.rhos)
    baseline, *probed = yield Stage("probe", ACCURACY.asked, (BASELINE, *probes))
    gains = [ACCURACY.gain(score, baseline) for score in probed]
    if not any(map(any, gains)):
        return Choice(_known(plan), (*remarks, _UNCHANGED))
    # Of equal ones the mildest, here and below: that which selects fewest heads.
    best = max(range(len(probes)), key=lambda i: (gains[i], plan.rhos[i]))
    rho = plan.rhos[best]
    sweep = tuple(_candidate(plan, f"share {share:g}", rho, share) for share in plan.grid)
    swept = yield Stage("sweep", ACCURACY.asked, sweep)
    gains = [ACCURACY.gain(score, baseline) for score in swept]
    best = max(range(len(sweep)), key=lambda i: (gains[i], -plan.grid[i]))
    if gains[best] <= nothing(gains[best]):
        remarks = *remarks, "No share was better than the baseline on the search samples."
    return Choice({**_known(plan), "rho": rho, "share": plan.grid[best]}, remarks)


_UNCHANGED = "No rho changed any score: rho and share stay the method's."


def _candidate(plan: Plan, label: str, rho: float, share: float) -> Candidate:
    return Candidate(label, {"method": "var", **_known(plan), "rho": rho, "share": share})


def _known(plan: Plan) -> dict[str, Any]:
    return {"sink_dims": [*plan.sink_dims], "tau": plan.tau}
