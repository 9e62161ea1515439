"""ZeroTuning: scale the attention every row pays to the first token.

Paper: "ZeroTuning: Unlocking the Initial Token's Power to Enhance Large Language Models
Without Training", https://arxiv.org/abs/2505.11739.

For every row `i` of the selected layers and query heads, with `D_i = 1 + (gamma - 1) p_i0`,

    p'_i0 = gamma p_i0 / D_i        p'_ij = p_ij / D_i    for j > 0,

which equals a logit bias of `log gamma` on key 0. `gamma > 1` flattens the other weights,
`gamma < 1` sharpens them, `gamma = 1` changes nothing. Row 0 sees only key 0 and stays as it
is; so does a row from whose sliding window key 0 has dropped out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from calibrators.interface import (
    Bound,
    CalibrationError,
    Coefficients,
    LayerPlan,
    Masses,
    Modality,
    ModelFacts,
    Observation,
    Observed,
    Pool,
    Prefill,
    Prompt,
    Rows,
)
from calibrators.settings import (
    CalibrationSettings,
    Heads,
    Layers,
    normal_form,
    select,
    selected_heads,
)

if TYPE_CHECKING:
    import torch


# Where less mass than this is left for the other keys, the row stays as it is.
NOTHING_LEFT = 1e-6


class ZeroTuningSettings(CalibrationSettings):
    """Request object of ZeroTuning."""

    method: Literal["zerotuning"] = "zerotuning"
    """Name of the calibrator."""
    gamma: Annotated[float, Field(gt=0, le=100)] | None = None
    """Factor on the attention to the first token, 0 < gamma <= 100; 1 changes nothing.
    Required: the best value depends on model and task."""
    layers: Layers = "all"
    """Decoder layers: "all" or a list of distinct 0-based layers."""
    heads: Heads = "all"
    """Query heads: "all", a list used in every selected layer, or {layer: [heads]}."""


class ZeroTuning:
    """Initial-token scaling; equations at the head of the module."""

    name: ClassVar[str] = "zerotuning"
    title: ClassVar[str] = "ZeroTuning"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.11739"
    modality: ClassVar[Modality] = "text"
    causal: ClassVar[bool] = True
    touches_prompt_kv: ClassVar[bool] = True
    reweights: ClassVar[bool] = True
    revision: ClassVar[int] = 1
    pools: ClassVar[tuple[str, ...]] = ("key0",)
    parameters: ClassVar[tuple[str, ...]] = ("gamma",)
    rescales: ClassVar[str | None] = "gamma"
    Settings: ClassVar[type[CalibrationSettings]] = ZeroTuningSettings

    def bind(self, settings: CalibrationSettings, facts: ModelFacts) -> Bound:
        """Resolve layers and heads; refuse a request without `gamma`."""
        if not isinstance(settings, ZeroTuningSettings):
            raise TypeError(f"ZeroTuning got {type(settings).__name__}")
        if settings.gamma is None:
            raise CalibrationError(
                "gamma", "gamma is required: a number with 0 < gamma <= 100; there is no default"
            )
        selection = select(settings.layers, settings.heads, facts)
        return Bound(
            method=self.name,
            params={"gamma": settings.gamma, **normal_form(selection, facts)},
            layers=len(selection),
            heads=sum(map(len, selection.values())),
        )

    def prefill(self, bound: Bound) -> Prefill:  # noqa: ARG002 - the same for all settings
        """Any chunks: a row depends on keys at or before it alone."""
        return Prefill.ANY

    def observe(self, bound: Bound, prompt: Prompt) -> tuple[Observation, ...]:  # noqa: ARG002
        """Nothing."""
        return ()

    def rows(self, bound: Bound, prompt: Prompt) -> Rows:  # noqa: ARG002
        """Every row, prompt and generated."""
        return Rows()

    def resolve(
        self,
        bound: Bound,
        layer: int,
        facts: ModelFacts,
        prompt: Prompt,  # noqa: ARG002
        observed: Observed,  # noqa: ARG002
    ) -> LayerPlan | None:
        """One pool, key 0, and gamma on the selected heads."""
        chosen = selected_heads(bound.params, layer, facts)
        if not chosen:
            return None
        heads = np.zeros(facts.query_heads, np.bool_)
        heads[chosen] = True
        gamma = np.where(heads, np.float32(str(bound.params["gamma"])), np.float32(1))
        return LayerPlan(heads, {"gamma": gamma}, (Pool(np.zeros(1, np.int32)),))

    def coefficients(self, masses: Masses, parameters: Mapping[str, torch.Tensor]) -> Coefficients:
        """`c_0 = gamma / D`, `c_rest = 1 / D`."""
        import torch  # the contract is importable without it, admission too

        mass = masses.plain[..., 0]
        # A row that sees key 0 alone, as far as float32 can tell, has nothing to trade with.
        gamma = torch.where(1 - mass > NOTHING_LEFT, parameters["gamma"], 1.0)
        # lerp is exact at gamma 1 and keeps all digits where the mass is nearly 1.
        denominator = torch.lerp(torch.ones_like(gamma), gamma, mass)
        on_key0 = gamma / denominator
        return Coefficients(
            rest=denominator.reciprocal(),
            pools=on_key0[..., None],
            apply=mass > 0,  # zero only where a sliding window hides key 0
            statistics={"key0_mass_before": mass, "key0_mass_after": on_key0 * mass},
        )
