"""VAR: give attention that sinks draw to the rest of the image, in heads that look at it.

Paper: "See What You Are Told: Visual Attention Sink in Large Multimodal Models",
https://arxiv.org/abs/2503.03321.

Sinks are the tokens at which a few channels `D` of the residual stream entering a layer stand out:

    phi(x) = max_{d in D} |x_d| / sqrt(mean_k x_k^2 + 1e-6)        S = { j < P : phi(x_j) > tau }.

Text rows behind the first image, and generated rows, see image tokens VIS with a mass `m_vis`, of
which visual sinks have `a_v`, and sinks outside images with `a_t`. With `N = m_vis - a_v`, a row is
selected on a head where `a_v > 0`, `m_vis >= min_visual_mass`, `1 - a_v / m_vis >= rho`, `N > 0`:

    p'_j = (1 - share) p_j                       for j in S
    p'_j = p_j (1 + share (a_v + a_t) / N)       for j in VIS, not in S
    p'_j = p_j                                   otherwise.

All other rows and heads stay as they are, and so do all with `share = 0`. Whether a token is a sink
is told by itself and those before it: prompts come in any chunks, and equal settings share KV.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, cast

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
    ResidualPeaks,
    Rows,
    Skip,
)
from calibrators.models import published
from calibrators.settings import (
    CalibrationSettings,
    Indices,
    Layers,
    check_range,
    layers_form,
    select_layers,
    selected_layers,
)

if TYPE_CHECKING:
    import torch

    from calibrators.interface import BoolArray, IntArray

# As in the paper, the layers below and the last are left alone unless a request names them.
FIRST_LAYER = 2
# Less than this passes for nothing: a mass may be divided by anything above it.
NOTHING = 1e-30


class VARSettings(CalibrationSettings):
    """Request object of VAR."""

    method: Literal["var"] = "var"
    """Name of the calibrator."""
    tau: Annotated[float, Field(gt=0)] = 20.0
    """How far a sink's channels stand out of its residual stream, in root mean squares; tau > 0."""
    rho: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Heads are selected where at least this share of their attention to images is not on sinks,
    0 <= rho <= 1; the paper has 0.8 in general, 0.5 against hallucination."""
    share: Annotated[float, Field(ge=0, le=1)] = 0.6
    """Share of the sinks' attention that is moved to the rest of the images, 0 <= share <= 1; 0
    changes nothing."""
    min_visual_mass: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Heads are selected where images have at least this share of their attention, 0 to 1."""
    layers: Layers | None = None
    """Decoder layers: "all" or a list of distinct 0-based layers; by default 2 to the last but
    one."""
    sink_dims: Indices | None = None
    """Distinct channels of the residual stream that stand out at sinks. Known for some models,
    required for others."""


class VAR:
    """Visual attention redistribution; equations at the head of the module."""

    name: ClassVar[str] = "var"
    title: ClassVar[str] = "VAR"
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.03321"
    modality: ClassVar[Modality] = "vision"
    causal: ClassVar[bool] = True
    touches_prompt_kv: ClassVar[bool] = True
    reweights: ClassVar[bool] = True
    revision: ClassVar[int] = 1
    pools: ClassVar[tuple[str, ...]] = ("visual_sinks", "text_sinks", "visual_nonsinks")
    parameters: ClassVar[tuple[str, ...]] = ("rho", "share", "min_visual_mass")
    rescales: ClassVar[str | None] = None
    Settings: ClassVar[type[CalibrationSettings]] = VARSettings

    def bind(self, settings: CalibrationSettings, facts: ModelFacts) -> Bound:
        """Resolve layers and sink channels; refuse a model whose channels nobody names."""
        if not isinstance(settings, VARSettings):
            raise TypeError(f"VAR got {type(settings).__name__}")
        layers = select_layers(_layers(settings, facts), facts)
        return Bound(
            method=self.name,
            params={
                "tau": settings.tau,
                "rho": settings.rho,
                "share": settings.share,
                "min_visual_mass": settings.min_visual_mass,
                "sink_dims": [*_sink_dims(settings, facts)],
                "layers": layers_form(layers, facts),
            },
            layers=len(layers),
            heads=len(layers) * facts.query_heads,
        )

    def prefill(self, bound: Bound) -> Prefill:  # noqa: ARG002 - the same for all settings
        """Any chunks: a row depends on keys and sinks at or before it alone."""
        return Prefill.ANY

    def observe(
        self,
        bound: Bound,
        prompt: Prompt,  # noqa: ARG002 - the same for all prompts
    ) -> tuple[Observation, ...]:
        """Peaks of the sink channels in the selected layers."""
        layers = bound.params["layers"]
        chosen = cast("list[int]", layers) if isinstance(layers, list) else range(bound.layers)
        return tuple(_peaks(bound, layer) for layer in chosen)

    def rows(self, bound: Bound, prompt: Prompt) -> Rows:  # noqa: ARG002
        """Text behind the first image, and generated rows."""
        if not prompt.images:
            return Rows(first=prompt.length)
        first = (prompt.extents or prompt.images)[0]
        return Rows(first=first.stop, skip=prompt.images[1:])

    def resolve(
        self, bound: Bound, layer: int, facts: ModelFacts, prompt: Prompt, observed: Observed
    ) -> LayerPlan | Skip | None:
        """Three pools: sinks in images, sinks outside, and the rest of the images.

        A layer without visual sinks selects nothing, but is measured: statistics are over all rows
        and heads that VAR looks at.
        """
        if layer not in selected_layers(bound.params, facts):
            return None
        if not prompt.images:
            return Skip("the prompt has no image")
        tau = cast("float", bound.params["tau"])
        image = _image(prompt)
        sinks: BoolArray = observed[_peaks(bound, layer)] > tau
        pools = [_where(sinks & image), _where(sinks & ~image), _where(image & ~sinks)]
        plan = LayerPlan(
            np.ones(facts.query_heads, np.bool_),
            {
                name: np.full(facts.query_heads, bound.params[name], np.float32)
                for name in self.parameters
            },
            tuple(Pool(keys) for keys in pools),
            statistics={"visual_sinks": float(len(pools[0])), "text_sinks": float(len(pools[1]))},
        )
        if len(pools[0]):
            return plan
        return Skip(f"no image token is an attention sink in any selected layer (tau {tau})", plan)

    def coefficients(self, masses: Masses, parameters: Mapping[str, torch.Tensor]) -> Coefficients:
        """`c_S = 1 - share`, `c_vis = 1 + share (a_v + a_t) / N`, `c_rest = 1` where selected."""
        import torch  # the contract is importable without it, admission too

        visual, text, others = masses.plain.unbind(-1)
        seen, share = visual + others, parameters["share"]
        # What is not finite is passed over by no test, so that the engine finds it.
        passed_over = (
            (visual <= 0)
            | (seen < parameters["min_visual_mass"])
            | (others < parameters["rho"] * seen)
            | (others <= NOTHING)
        )
        moved, kept = share * (visual + text), 1 - share
        gain = moved / torch.where(passed_over, 1.0, others)
        selected = ~passed_over
        return Coefficients(
            rest=torch.ones_like(others),
            pools=torch.stack([kept, kept, 1 + gain], -1),
            apply=selected,
            eligible=torch.ones_like(passed_over),
            statistics={
                "selected_share": selected.float(),
                "visual_nonsink_mass_before": others,
                "visual_nonsink_mass_after": torch.where(passed_over, others, others + moved),
            },
        )


def _layers(settings: VARSettings, facts: ModelFacts) -> Layers:
    if settings.layers is not None:
        return settings.layers
    if facts.layers <= FIRST_LAYER + 1:
        raise CalibrationError(
            "layers",
            f"layers defaults to {FIRST_LAYER} up to the last but one, but the model has "
            f"{facts.layers}: name some of 0 to {facts.layers - 1}",
        )
    return list(range(FIRST_LAYER, facts.layers - 1))


def _sink_dims(settings: VARSettings, facts: ModelFacts) -> list[int] | tuple[int, ...]:
    if settings.sink_dims is not None:
        check_range("sink_dims", settings.sink_dims, facts.hidden_size, "channels")
        return settings.sink_dims
    known = published(facts).sink_dims
    if known is None:
        raise CalibrationError(
            "sink_dims",
            f"sink_dims are not known for this model ({facts.architecture} of {facts.layers} "
            f"layers, {facts.hidden_size} channels): give them, or find them with "
            "`trimtab profile var`",
        )
    return known


def _peaks(bound: Bound, layer: int) -> ResidualPeaks:
    """What is observed in a selected layer."""
    return ResidualPeaks(layer, tuple(cast("list[int]", bound.params["sink_dims"])))


def _image(prompt: Prompt) -> BoolArray:
    """Which positions of the prompt are in an image."""
    image = np.zeros(prompt.length, np.bool_)
    for span in prompt.images:
        image[span.start : span.stop] = True
    return image


def _where(keys: BoolArray) -> IntArray:
    return np.flatnonzero(keys).astype(np.int32)
