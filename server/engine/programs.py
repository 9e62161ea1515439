"""One calibration of one request, as a worker carries it out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from calibrators.capabilities import across_heads, chooses_heads
from calibrators.interface import (
    Bound,
    Calibrator,
    LayerPlan,
    ModelFacts,
    Observed,
    Prompt,
    Skip,
)
from server.engine.outcomes import Outcomes
from server.engine.payload import Tally
from server.engine.pools import LayerPools
from server.engine.taps.making import make_taps
from server.engine.taps.peaks import PeakTable

if TYPE_CHECKING:
    from calibrators.interface import FloatArray


@dataclass(frozen=True, slots=True)
class HeadShard:
    """The query heads of this tensor-parallel rank: `start <= head < stop` of the model."""

    start: int
    stop: int


class Program:
    """A calibration with what it does in every layer of this rank.

    Layers in which something has to be measured are left alone until `resolve` is called with it.

    Attributes:
        calibrator: its method.
        prompt: geometry of the prompt.
        prefill: how it asked to have the prompt cut.
        rows: which positions are calibrated.
        taps: what has to be measured.
        observed: layers that are resolved when something was measured.
        own: the heads of this rank among those of the model.
        heads: bool `[layers, heads of this rank]`.
        active: bool `[layers]`, whether any head is selected: of this rank, or of the model for a
            method that looks across heads.
        parameters: float32 `[layers, heads]` by name, of the same heads as `active`.
        pools: per layer.
        tally: what was done so far.
        abandoned: what it observed came to nothing.
    """

    def __init__(
        self,
        calibrator: Calibrator,
        bound: Bound,
        prompt: Prompt,
        facts: ModelFacts,
        shard: HeadShard,
        peaks: PeakTable,
        text_outputs: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.calibrator = calibrator
        self.prompt = prompt
        self._bound, self._facts = bound, facts
        self.own = slice(shard.start, shard.stop)
        self._known = slice(0, facts.query_heads) if across_heads(calibrator) else self.own
        shape = facts.layers, shard.stop - shard.start
        self.prefill = calibrator.prefill(bound)
        self.rows = calibrator.rows(bound, prompt)
        asked = calibrator, bound, prompt, self.rows
        self.taps = make_taps(*asked, facts, self.own, peaks, text_outputs)
        self.observed = frozenset(tap.layer for tap in self.taps)
        if not all(tap.local for tap in self.taps):
            self.observed = frozenset(range(facts.layers))
        self.heads = np.zeros(shape, np.bool_)
        self.active = np.zeros(facts.layers, np.bool_)
        wide = facts.layers, self._known.stop - self._known.start
        self.parameters = {name: np.zeros(wide, np.float32) for name in calibrator.parameters}
        self.pools = [LayerPools.none(len(calibrator.pools))] * facts.layers
        self.tally = Tally()
        self.abandoned = False
        self._outcomes = Outcomes(self.tally, chooses_heads=chooses_heads(calibrator))
        for layer in range(facts.layers):
            if layer not in self.observed:
                self.resolve(layer, {})

    def resolve(self, layer: int, observed: Observed) -> Program:
        """Settle a layer, anew if it was before; the program itself.

        Raises:
            Exception: whatever the calibrator raises, or its plan does not fit; the layer stays as
                it was.
        """
        found = self.calibrator.resolve(self._bound, layer, self._facts, self.prompt, observed)
        plan = found.plan if isinstance(found, Skip) else found
        count = len(self.calibrator.pools)
        if plan is None:
            self.heads[layer] = self.active[layer] = False
            self.pools[layer] = LayerPools.none(count)
            self._outcomes.note(layer, found)
            return self
        pools = LayerPools.of(plan, count, self._facts.query_heads, self.own)
        heads = self._part(plan.heads, self.own).astype(np.bool_)
        parameters = self._known_parameters(plan)
        self._outcomes.note(layer, found)
        self.heads[layer], self.pools[layer] = heads, pools
        self.active[layer] = plan.heads[self._known].any()
        for name, values in parameters.items():
            self.parameters[name][layer] = values
        return self

    def abandon(self) -> None:
        """Leave every layer alone from now on."""
        self.abandoned = True
        self.heads[:] = self.active[:] = False

    def _known_parameters(self, plan: LayerPlan) -> Mapping[str, FloatArray]:
        given, names = plan.parameters, self.calibrator.parameters
        return {name: self._part(given[name], self._known).astype(np.float32) for name in names}

    def _part(self, per_head: npt.NDArray[Any], heads: slice) -> npt.NDArray[Any]:
        if per_head.shape != (self._facts.query_heads,):
            raise ValueError(f"a plan has {per_head.shape} in place of one entry per query head")
        return per_head[heads]
