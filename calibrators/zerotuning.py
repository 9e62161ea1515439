"""ZeroTuning: scale the attention every row pays to the first token.

Paper: "ZeroTuning: Unlocking the Initial Token's Power to Enhance Large Language Models
Without Training", https://arxiv.org/abs/2505.11739.

For every row `i` of the selected layers and query heads, with `D_i = 1 + (gamma - 1) p_i0`,

    p'_i0 = gamma p_i0 / D_i        p'_ij = p_ij / D_i    for j > 0,

which equals a logit bias of `log gamma` on key 0. `gamma > 1` flattens the other weights,
`gamma < 1` sharpens them, `gamma = 1` changes nothing. Row 0 sees only key 0 and stays as it
is; so does a row from whose sliding window key 0 has dropped out. A profile may give one gamma
per layer and query head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, TypeAlias, cast

import numpy as np
from pydantic import Field

from calibrators.interface import (
    Bound,
    CalibrationError,
    Coefficients,
    Json,
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
    MAX_INDICES,
    CalibrationSettings,
    Heads,
    LayerKey,
    Layers,
    Selection,
    check_range,
    normal_form,
    select,
    selected_heads,
)

if TYPE_CHECKING:
    import torch

    from calibrators.interface import FloatArray

# Where less mass than this is left for the other keys, the row stays as it is.
NOTHING_LEFT = 1e-6

Gamma: TypeAlias = Annotated[float, Field(gt=0, le=100)]
GammaByHead: TypeAlias = Annotated[
    dict[LayerKey, Gamma], Field(min_length=1, max_length=MAX_INDICES)
]
Strengths: TypeAlias = Annotated[
    dict[LayerKey, GammaByHead], Field(min_length=1, max_length=MAX_INDICES)
]


class ZeroTuningSettings(CalibrationSettings):
    """Request object of ZeroTuning."""

    method: Literal["zerotuning"] = "zerotuning"
    """Name of the calibrator."""
    gamma: Annotated[Gamma | None, Field(examples=[0.5])] = None
    """Factor on the attention to the first token, 0 < gamma <= 100; 1 changes nothing.
    Required unless a profile gives it: the best value depends on model and task."""
    layers: Layers = "all"
    """Decoder layers: "all" or a list of distinct 0-based layers."""
    heads: Heads = "all"
    """Query heads: "all", a list used in every selected layer, or {layer: [heads]}."""


class ZeroTuningProfileSettings(ZeroTuningSettings):
    """A request of ZeroTuning with what its profile adds."""

    strengths: Strengths | None = None
    """One gamma per {layer: {head: gamma}}. `layers` and `heads` restrict them; `gamma` takes
    their place, and leaves their choice of layers and heads."""


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
    strengths: ClassVar[str] = "gamma"
    Settings: ClassVar[type[CalibrationSettings]] = ZeroTuningSettings
    ProfileSettings: ClassVar[type[CalibrationSettings]] = ZeroTuningProfileSettings

    def bind(self, settings: CalibrationSettings, facts: ModelFacts) -> Bound:
        """Resolve gamma, layers and heads; refuse a request that neither has nor gets `gamma`."""
        if not isinstance(settings, ZeroTuningSettings):
            raise TypeError(f"ZeroTuning got {type(settings).__name__}")
        selection = select(settings.layers, settings.heads, facts)
        gamma: Json = settings.gamma
        strengths: Strengths | None = getattr(settings, "strengths", None)
        if strengths is not None:
            selection = _restricted(strengths, selection, facts)
            gamma = _gammas(strengths, selection) if gamma is None else gamma
        if gamma is None:
            raise CalibrationError(
                "gamma", "gamma is required: a number with 0 < gamma <= 100; there is no default"
            )
        return Bound(
            method=self.name,
            params={"gamma": gamma, **normal_form(selection, facts)},
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
        gamma = np.ones(facts.query_heads, np.float32)
        gamma[chosen] = _gamma_of(bound.params["gamma"], layer, chosen)
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


def _restricted(strengths: Strengths, selection: Selection, facts: ModelFacts) -> Selection:
    """Layers and heads that have a strength and are selected."""
    check_range("strengths", strengths, facts.layers, "layers")
    for layer, heads in strengths.items():
        check_range("strengths", heads, facts.query_heads, f"query heads (in layer {layer})")
    both = {
        layer: tuple(head for head in selection.get(layer, ()) if head in strengths[layer])
        for layer in sorted(strengths)
    }
    kept = {layer: heads for layer, heads in both.items() if heads}
    if not kept:
        raise CalibrationError(
            "layers" if selection.keys().isdisjoint(strengths) else "heads",
            "layers and heads leave out all that the profile has a gamma for; it has some in "
            f"{len(strengths)} layers, {min(strengths)} the first and {max(strengths)} the last",
        )
    return kept


def _gammas(strengths: Strengths, selection: Selection) -> Json:
    """Gammas of a selection in the one form that equal ones share: a number where it is the same
    everywhere."""
    gammas: dict[str, Json] = {
        str(layer): {str(head): strengths[layer][head] for head in heads}
        for layer, heads in selection.items()
    }
    distinct = {strengths[layer][head] for layer, heads in selection.items() for head in heads}
    return distinct.pop() if len(distinct) == 1 else gammas


def _gamma_of(gamma: Json, layer: int, heads: list[int]) -> FloatArray:
    """Gammas of some heads of a layer, float32 `[len(heads)]`."""
    if not isinstance(gamma, dict):
        return np.full(len(heads), gamma, np.float32)
    by_head = cast("dict[str, float]", gamma[str(layer)])
    return np.array([by_head[str(head)] for head in heads], np.float32)
