"""VHR: reinforce the heads whose output depends on the image.

Paper: "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence",
https://arxiv.org/abs/2412.13949.

In each selected layer, `A_h` is what head h makes of the last prompt row, and `T_h` the same for
the prompt without its image tokens. Over the layer's heads,

    VHD_h = ||A_h - T_h||        TA_h = ||T_h||^2
    VHD_h := 0    where VHD_h > mean + std of VHD and TA_h > mean + std of TA,

and the heads with `VHD_h` above the (lower) median have their outputs multiplied by `alpha`.
`alpha = 1` changes nothing. Heads are chosen once per request, layer by layer, on activations that
lower layers have reinforced already.

With `rows = "all"` all prompt rows are multiplied, and the whole prompt has to come in one step;
with `"last"` the last one alone, in a step of its own. Generated rows are, either way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, cast

import numpy as np
import numpy.typing as npt
from pydantic import Field

from calibrators.interface import (
    Bound,
    CalibrationError,
    Coefficients,
    HeadOutputs,
    LayerPlan,
    Masses,
    Modality,
    ModelFacts,
    Observation,
    Observed,
    Prefill,
    Prompt,
    Rows,
)
from calibrators.models import DEPTH_SCALED, published
from calibrators.settings import (
    CalibrationSettings,
    Layers,
    layers_form,
    select_layers,
    selected_layers,
)

if TYPE_CHECKING:
    import torch

    from calibrators.interface import BoolArray, FloatArray

# The layer near the bottom that the paper reinforces besides the last ones.
EARLY_LAYER = 1


class VHRSettings(CalibrationSettings):
    """Request object of VHR."""

    method: Literal["vhr"] = "vhr"
    """Name of the calibrator."""
    alpha: Annotated[float, Field(ge=0, le=4)] = 2.0
    """Factor on the outputs of the chosen heads, 0 <= alpha <= 4; 1 changes nothing, at 4 answers
    degenerate."""
    layers: Layers | None = None
    """Decoder layers: "all" or a list of distinct 0-based layers; by default layer 1 and the last
    7/16 of the depth."""
    rows: Literal["all", "last"] = "all"
    """Prompt rows that are reinforced: "all", or the "last" alone."""


class VHR:
    """Vision-aware head reinforcement; equations at the head of the module."""

    name: ClassVar[str] = "vhr"
    title: ClassVar[str] = "VHR"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.13949"
    modality: ClassVar[Modality] = "vision"
    causal: ClassVar[bool] = False
    touches_prompt_kv: ClassVar[bool] = True
    reweights: ClassVar[bool] = False
    chooses_heads: ClassVar[bool] = True
    revision: ClassVar[int] = 1
    pools: ClassVar[tuple[str, ...]] = ()
    parameters: ClassVar[tuple[str, ...]] = ("alpha",)
    rescales: ClassVar[str | None] = None
    Settings: ClassVar[type[CalibrationSettings]] = VHRSettings

    def bind(self, settings: CalibrationSettings, facts: ModelFacts) -> Bound:
        """Resolve the layers."""
        if not isinstance(settings, VHRSettings):
            raise TypeError(f"VHR got {type(settings).__name__}")
        known = published(facts).vision_layers
        usual = _depth_scaled(facts) if known is None else [*known]
        layers = select_layers(_layers(settings, usual), facts)
        return Bound(
            method=self.name,
            params={
                "alpha": settings.alpha,
                "rows": settings.rows,
                "layers": layers_form(layers, facts),
                "defaults": DEPTH_SCALED if known is None and layers == usual else None,
            },
            layers=len(layers),
            heads=len(layers) * facts.query_heads,
        )

    def prefill(self, bound: Bound) -> Prefill:
        """What decides about all rows is known with the last."""
        return Prefill.WHOLE if bound.params["rows"] == "all" else Prefill.SPLIT_LAST

    def observe(
        self,
        bound: Bound,
        prompt: Prompt,  # noqa: ARG002 - the same for all prompts
    ) -> tuple[Observation, ...]:
        """Head outputs of the selected layers, with images and without."""
        layers = bound.params["layers"]
        chosen = cast("list[int]", layers) if isinstance(layers, list) else range(bound.layers)
        return tuple(
            HeadOutputs(layer, without_images)
            for layer in chosen
            for without_images in (False, True)
        )

    def rows(self, bound: Bound, prompt: Prompt) -> Rows:
        """Every row, or the last prompt row and generated ones."""
        return Rows(first=0 if bound.params["rows"] == "all" else max(prompt.length - 1, 0))

    def resolve(
        self,
        bound: Bound,
        layer: int,
        facts: ModelFacts,
        prompt: Prompt,  # noqa: ARG002
        observed: Observed,
    ) -> LayerPlan | None:
        """The heads that look at the image more than the median head does."""
        if layer not in selected_layers(bound.params, facts):
            return None
        chosen = _vision_aware(
            observed[HeadOutputs(layer)], observed[HeadOutputs(layer, without_images=True)]
        )
        return LayerPlan(
            chosen,
            {"alpha": np.full(facts.query_heads, bound.params["alpha"], np.float32)},
            details={"heads_selected": np.flatnonzero(chosen).tolist()},
        )

    def coefficients(self, masses: Masses, parameters: Mapping[str, torch.Tensor]) -> Coefficients:
        """No pools, the head scale alone."""
        import torch  # the contract is importable without it, admission too

        return Coefficients(rest=torch.ones_like(masses.rest), scale=parameters["alpha"])


def _depth_scaled(facts: ModelFacts) -> list[int]:
    last = range(facts.layers - 7 * facts.layers // 16, facts.layers)
    return sorted({EARLY_LAYER, *last} & set(range(facts.layers)))


def _layers(settings: VHRSettings, usual: list[int]) -> Layers:
    if settings.layers is not None:
        return settings.layers
    if not usual:
        raise CalibrationError(
            "layers", "layers defaults to layer 1 and the last 7/16, but the model has 1: name [0]"
        )
    return usual


def _vision_aware(with_images: FloatArray, without: FloatArray) -> BoolArray:
    """Which heads `[query_heads]` are reinforced; both `[query_heads, head_dim]`.

    In float64: a sum of squares may be beyond float32.
    """
    text = without.astype(np.float64)
    divergence = np.linalg.norm(with_images.astype(np.float64) - text, axis=1)
    strength = np.square(text).sum(1)
    divergence[_stands_out(divergence) & _stands_out(strength)] = 0
    median = np.sort(divergence)[(len(divergence) - 1) // 2]
    aware: BoolArray = divergence > median
    return aware


def _stands_out(values: npt.NDArray[np.float64]) -> BoolArray:
    out: BoolArray = values > values.mean() + values.std()
    return out
