"""The search of ACT: which (layer, head) pairs, then one beta for all of them.

Pairs are screened by the attention that their sinks draw: where there are no sinks, ACT changes
nothing, and little where they draw little. Pairs that stay are calibrated one at a time. Those that
beat the baseline are calibrated together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from server.profiling.search import (
    ACCURACY,
    BASELINE,
    Candidate,
    Choice,
    Gain,
    Score,
    Search,
    SearchFailed,
    Stage,
    nothing,
)

GRID = (0.0, 0.2, 0.4, 0.6, 0.8)
PROBE = 0.4
SCREEN = 32
SCREEN_SAMPLES = 4
# As the method's default has it: sinks of the layers below are left alone.
FIRST_LAYER = 2
# Settles numbers that are meant to be equal.
DIGITS = 9

Pair: TypeAlias = tuple[int, int]
"""Layer and query head."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to search.

    Attributes:
        layers: decoder layers of the model, more than `FIRST_LAYER`.
        heads: query heads of a layer.
        probe: beta that every pair is probed with.
        screen: pairs that are probed, at most.
        screen_samples: samples that pairs are screened on.
        grid: betas to choose from.
        alpha: what makes a sink; None for the method's default.
    """

    layers: int
    heads: int
    probe: float = PROBE
    screen: int = SCREEN
    screen_samples: int = SCREEN_SAMPLES
    grid: tuple[float, ...] = GRID
    alpha: float | None = None


def search(plan: Plan) -> Search:
    """Screen pairs by sink mass, probe what is left, sweep beta over those that help.

    Raises:
        SearchFailed: no pair has a sink.
    """
    pairs = [(layer, h) for layer in range(FIRST_LAYER, plan.layers) for h in range(plan.heads)]
    probes = {pair: _candidate(plan, _named(pair), plan.probe, [pair]) for pair in pairs}
    masses = yield Stage("screen", "sinks", tuple(probes.values()), plan.screen_samples)
    kept = _heaviest(pairs, masses, plan.screen)
    baseline, *probed = yield Stage(
        "probe", ACCURACY.asked, (BASELINE, *(probes[pair] for pair in kept))
    )
    gains = [ACCURACY.gain(score, baseline) for score in probed]
    chosen, remarks = _helpful(kept, gains)
    sweep = tuple(_candidate(plan, f"beta {beta:g}", beta, chosen) for beta in plan.grid)
    swept = yield Stage("sweep", ACCURACY.asked, sweep)
    gains = [ACCURACY.gain(score, baseline) for score in swept]
    # Of equal ones the mildest.
    best = max(range(len(sweep)), key=lambda i: (gains[i], plan.grid[i]))
    if gains[best] <= nothing(gains[best]):
        remarks.append("No beta was better than the baseline on the search samples, either.")
    return Choice(_parameters(plan, plan.grid[best], chosen), tuple(remarks))


def _candidate(plan: Plan, label: str, beta: float, pairs: Sequence[Pair]) -> Candidate:
    return Candidate(label, {"method": "act", **_parameters(plan, beta, pairs)})


def _parameters(plan: Plan, beta: float, pairs: Sequence[Pair]) -> Mapping[str, Any]:
    heads: defaultdict[str, list[int]] = defaultdict(list)
    for layer, head in sorted(pairs):
        heads[str(layer)].append(head)
    alpha = {} if plan.alpha is None else {"alpha": plan.alpha}
    return {"beta": beta, **alpha, "heads": dict(heads)}


def _heaviest(pairs: Sequence[Pair], masses: Sequence[Score], count: int) -> list[Pair]:
    """Pairs whose sinks draw most; of equal ones the lower."""
    by_pair = {
        pair: round(score["sink_mass"], DIGITS) for pair, score in zip(pairs, masses, strict=True)
    }
    drawn = [pair for pair in pairs if by_pair[pair] > 0]
    if not drawn:
        raise SearchFailed("no head has sinks in these prompts; a lower --alpha finds more")
    return sorted(drawn, key=lambda pair: -by_pair[pair])[:count]


def _helpful(pairs: Sequence[Pair], gains: Sequence[Gain]) -> tuple[list[Pair], list[str]]:
    helpful = [pair for pair, gain in zip(pairs, gains, strict=True) if gain > nothing(gain)]
    if helpful:
        return helpful, [f"{len(helpful)} of {len(pairs)} probed pairs beat the baseline."]
    best = max(range(len(pairs)), key=gains.__getitem__)
    told = f"None of {len(pairs)} probed pairs beat the baseline; the least bad one was taken."
    return [pairs[best]], [told]


def _named(pair: Pair) -> str:
    return f"layer {pair[0]}, head {pair[1]}"
