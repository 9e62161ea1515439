"""What a calibration's plans say in the receipt, layer by layer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from calibrators.interface import LayerPlan, Skip

if TYPE_CHECKING:
    from calibrators.interface import Json
    from server.engine.payload import Tally


class Outcomes:
    """Statistics, details, chosen heads and skips of the layers resolved so far.

    A layer that is resolved again says what it says now.

    Args:
        tally: where the numbers of all layers go.
        chooses_heads: the number of heads depends on the plans.
    """

    def __init__(self, tally: Tally, *, chooses_heads: bool) -> None:
        self._tally = tally
        self._statistics: dict[int, Mapping[str, float]] = {}
        self._details: dict[int, Mapping[str, Json]] = {}
        self._heads: dict[int, int] | None = {} if chooses_heads else None
        self._skips: dict[int, str | None] = {}
        if chooses_heads:
            tally.heads = 0

    def note(self, layer: int, outcome: LayerPlan | Skip | None) -> None:
        """Take up what a layer was resolved to.

        Raises:
            ValueError: a number is not finite.
            TypeError: a detail is no JSON.
        """
        plan = outcome.plan if isinstance(outcome, Skip) else outcome
        self._take_statistics(layer, {} if plan is None else plan.statistics)
        self._take_details(layer, {} if plan is None else plan.details)
        if self._heads is not None:
            self._heads[layer] = 0 if plan is None else int(plan.heads.sum())
            self._tally.heads = sum(self._heads.values())
        if outcome is not None:
            self._skips[layer] = outcome.reason if isinstance(outcome, Skip) else None
            reasons = [*self._skips.values()]
            self._tally.skipped = None if None in reasons else reasons[0]

    def _take_statistics(self, layer: int, statistics: Mapping[str, float]) -> None:
        numbers = {name: float(value) for name, value in statistics.items()}
        if not all(math.isfinite(value) for value in numbers.values()):
            raise ValueError("a statistic of a plan is not finite")
        if not numbers and layer not in self._statistics:
            return
        self._statistics[layer] = numbers
        sums, counts = self._tally.layer_sums, self._tally.layer_counts
        sums.clear()
        counts.clear()
        for each in self._statistics.values():
            for name, value in each.items():
                sums[name] = sums.get(name, 0.0) + value
                counts[name] = counts.get(name, 0) + 1

    def _take_details(self, layer: int, details: Mapping[str, Json]) -> None:
        # What is no JSON would end the engine on its way to the front end.
        json.dumps(details, allow_nan=False)
        if not details and layer not in self._details:
            return
        self._details[layer] = details
        shown = self._tally.details
        shown.clear()
        for known in sorted(self._details):
            for name, value in self._details[known].items():
                shown.setdefault(name, {})[str(known)] = value
