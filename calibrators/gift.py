"""GIFT: strengthen attention to what the question is about, in the image and in the question.

Paper: "Capturing Gaze Shifts for Guidance: Cross-Modal Fusion Enhancement for VLM Hallucination
Mitigation", https://arxiv.org/abs/2510.22067.

VIS are the image tokens, QRY the text tokens of the last user message, X those of them that belong
to words with a meaning of their own. Where attention to the image grows from one such token to the
next is where the question points. In one layer, over the upper half `H_s` of heads by `sum D`,

    D_hij = max(p_hij - p_h,i-1,j, 0)         i in X, j in VIS
    g_j   = mean of D over H_s and X, clipped to mean(g) +- 3 std(g)
    w_j   = exp(alpha (g_j - min g) / (max g - min g)).

In the selected layers, for the last prompt row and every generated row, with `V_h = sum_VIS p`,
`E_h = sum_VIS w p`, `Q_h = sum_QRY p` and the upper halves of heads `H_V` by V and `H_Q` by Q,

    r = beta sum_{H_V} E_h / sum_{H_V} V_h
    p'_hj ~ p_hj w_j  (h in H_V, j in VIS)     p_hj r  (h in H_Q, j in QRY)     p_hj otherwise,

and each row is divided by its sum. Halves are rounded down, to one head at least, and equal heads
rank by their index. `alpha = 0` with `beta = 1` changes nothing, nor does a row without attention
to images. A prompt without such words, or whose map is the same everywhere, is left alone.

The map comes from rows before the last: that one has to be computed after them, in a step of its
own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, cast

import numpy as np
import numpy.typing as npt
from pydantic import Field

from calibrators.interface import (
    Bound,
    Coefficients,
    LayerPlan,
    Masses,
    Modality,
    ModelFacts,
    Observation,
    Observed,
    Pool,
    Prefill,
    ProbabilityBlock,
    Prompt,
    Rows,
    Skip,
    Span,
)
from calibrators.models import DEPTH_SCALED, Enhancement, published
from calibrators.settings import (
    CalibrationSettings,
    Index,
    Layers,
    check_range,
    layers_form,
    select_layers,
    selected_layers,
)

if TYPE_CHECKING:
    import torch

    from calibrators.interface import FloatArray, IntArray

# Of the published models' 4 and 5, what most of them have.
USUAL_ALPHA = 5.0
# Where less than this is left of a row, it stays as it is.
NOTHING_LEFT = 1e-6


class GIFTSettings(CalibrationSettings):
    """Request object of GIFT."""

    method: Literal["gift"] = "gift"
    """Name of the calibrator."""
    alpha: Annotated[float, Field(ge=0, le=10)] | None = None
    """Strength of the saliency map, 0 <= alpha <= 10: image tokens weigh up to exp(alpha). By
    default that published for the model, else 5."""
    beta: Annotated[float, Field(ge=0, le=10)] = 1.0
    """Factor on the enhancement of the question, 0 <= beta <= 10."""
    saliency_layer: Index | None = None
    """Layer in which the map is taken; by default that published for the model, else a third of
    its depth."""
    layers: Layers | None = None
    """Decoder layers in which the map is used: "all" or a list of distinct 0-based layers; by
    default those published for the model, else from a third to two thirds of its depth."""


class GIFT:
    """Gaze-shift-guided enhancement; equations at the head of the module."""

    name: ClassVar[str] = "gift"
    title: ClassVar[str] = "GIFT"
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.22067"
    modality: ClassVar[Modality] = "vision"
    # The map is complete before the first row that it changes.
    causal: ClassVar[bool] = True
    touches_prompt_kv: ClassVar[bool] = True
    reweights: ClassVar[bool] = True
    across_heads: ClassVar[bool] = True
    reads_query: ClassVar[bool] = True
    revision: ClassVar[int] = 1
    pools: ClassVar[tuple[str, ...]] = ("visual", "query")
    parameters: ClassVar[tuple[str, ...]] = ("alpha", "beta")
    rescales: ClassVar[str | None] = None
    Settings: ClassVar[type[CalibrationSettings]] = GIFTSettings

    def bind(self, settings: CalibrationSettings, facts: ModelFacts) -> Bound:
        """Resolve layers and strength by the request, the published models or the depth."""
        if not isinstance(settings, GIFTSettings):
            raise TypeError(f"GIFT got {type(settings).__name__}")
        known = published(facts).enhancement
        usual = _depth_scaled(facts) if known is None else known
        layer = settings.saliency_layer
        layer = usual.saliency_layer if layer is None else layer
        check_range("saliency_layer", [layer], facts.layers, "layers")
        chosen = [*usual.layers] if settings.layers is None else settings.layers
        layers = select_layers(chosen, facts)
        # By value, not by what was left out: equal settings have one form.
        scaled = layer == usual.saliency_layer or layers == [*usual.layers]
        return Bound(
            method=self.name,
            params={
                "alpha": usual.alpha if settings.alpha is None else settings.alpha,
                "beta": settings.beta,
                "saliency_layer": layer,
                "layers": layers_form(layers, facts),
                "defaults": DEPTH_SCALED if known is None and scaled else None,
            },
            layers=len(layers),
            heads=len(layers) * facts.query_heads,
        )

    def prefill(self, bound: Bound) -> Prefill:  # noqa: ARG002 - the same for all settings
        """The last prompt token by itself, when the map is complete."""
        return Prefill.SPLIT_LAST

    def observe(self, bound: Bound, prompt: Prompt) -> tuple[Observation, ...]:
        """Probabilities of image tokens, in rows of content words and those before them."""
        return (_block(bound, prompt),)

    def rows(self, bound: Bound, prompt: Prompt) -> Rows:  # noqa: ARG002
        """The last prompt row, and generated ones."""
        return Rows(first=max(prompt.length - 1, 0))

    def resolve(
        self, bound: Bound, layer: int, facts: ModelFacts, prompt: Prompt, observed: Observed
    ) -> LayerPlan | Skip | None:
        """Two pools: image tokens, weighted by the map, and the question; on all heads."""
        if layer not in selected_layers(bound.params, facts):
            return None
        if not prompt.images:
            return Skip("the prompt has no image")
        block = _block(bound, prompt)
        if not block.rows:
            return Skip("the last user message has no content word before the end of the prompt")
        saliency = _saliency(observed[block], _within(block, prompt))
        if saliency is None:
            return Skip("no image token is more salient than the others for the last user message")
        alpha = cast("float", bound.params["alpha"])
        return LayerPlan(
            np.ones(facts.query_heads, np.bool_),
            {
                name: np.full(facts.query_heads, bound.params[name], np.float32)
                for name in self.parameters
            },
            (
                Pool(_positions(prompt.images), np.exp(alpha * saliency).astype(np.float32)),
                Pool(_positions(prompt.query)),
            ),
            statistics={"content_words": float(_words(prompt))},
        )

    def coefficients(self, masses: Masses, parameters: Mapping[str, torch.Tensor]) -> Coefficients:
        """Of heads in H_V and H_Q, divided by the row's new sum."""
        import torch  # the contract is importable without it, admission too

        visual, query = masses.plain.unbind(-1)
        weigh = parameters["alpha"] > 0
        enhanced = visual if masses.weighted is None else masses.weighted[..., 0]
        by_visual, by_query = _upper_half(visual) & weigh, _upper_half(query)
        r = parameters["beta"] * _gain(visual, enhanced, by_visual)
        on_visual = torch.where(by_visual, enhanced, visual)
        on_query = torch.where(by_query, r, 1.0)
        total = masses.rest + on_visual + on_query * query
        # What is not finite passes, so that the engine finds it and fails the request.
        left_alone = (visual.amax(-1, keepdim=True) <= 0) | (total < NOTHING_LEFT)
        # Exactly 1 on heads of neither half: they keep every bit.
        total = torch.where(left_alone | ~(by_visual | (by_query & (r != 1))), 1.0, total)
        plain = torch.stack([(~by_visual).to(total), on_query], -1)
        weighted = torch.stack([by_visual.to(total), torch.zeros_like(total)], -1)
        return Coefficients(
            rest=1 / total,
            pools=plain / total[..., None],
            weighted=None if masses.weighted is None else weighted / total[..., None],
            apply=~left_alone,
            eligible=torch.ones_like(left_alone),
            statistics={
                "mean_r": r,
                "visual_mass_before": visual,
                "visual_mass_after": torch.where(left_alone, visual, on_visual / total),
            },
        )


def _depth_scaled(facts: ModelFacts) -> Enhancement:
    """A third of the depth, and from there to two thirds."""
    third = facts.layers // 3
    return Enhancement(third, tuple(range(third, 2 * facts.layers // 3 + 1)), USUAL_ALPHA)


def _content(prompt: Prompt) -> list[int]:
    """Rows of content words that have a row before and are not the last of the prompt.

    That one is computed when the map is complete.
    """
    rows = {row for word in prompt.content for row in range(word.start, word.stop)}
    return sorted(row for row in rows if 0 < row < prompt.length - 1)


def _words(prompt: Prompt) -> int:
    """How many words `_content` has."""
    rows = _content(prompt)
    return sum(any(word.start <= row < word.stop for row in rows) for word in prompt.content)


def _block(bound: Bound, prompt: Prompt) -> ProbabilityBlock:
    """What is observed: content rows and the rows before them, which may be content rows too."""
    content = _content(prompt) if prompt.images else []
    rows = sorted({near for row in content for near in (row - 1, row)})
    layer = cast("int", bound.params["saliency_layer"])
    return ProbabilityBlock(layer, tuple(rows), prompt.images)


def _within(block: ProbabilityBlock, prompt: Prompt) -> npt.NDArray[np.intp]:
    """Where in the block the content rows are; the row before each comes right before it."""
    return np.searchsorted(np.array(block.rows), np.array(_content(prompt)))


def _saliency(block: FloatArray, content: npt.NDArray[np.intp]) -> npt.NDArray[np.float64] | None:
    """The map over image tokens in [0, 1], float64; None where it is the same everywhere.

    Args:
        block: float32 `[query_heads, rows, image tokens]`.
        content: rows of the block that are of content words.
    """
    growth = np.maximum(block[:, content] - block[:, content - 1], 0).astype(np.float64)
    ranked = np.argsort(-growth.sum((1, 2)), kind="stable")
    gaze = growth[ranked[: _half(len(ranked))]].mean((0, 1))
    if len(gaze) < 2:
        return None
    mean, spread = gaze.mean(), 3 * gaze.std(ddof=1)
    gaze = np.clip(gaze, mean - spread, mean + spread)
    lowest, highest = gaze.min(), gaze.max()
    if highest <= lowest:
        return None
    saliency: npt.NDArray[np.float64] = (gaze - lowest) / (highest - lowest)
    return saliency


def _half(heads: int) -> int:
    return max(heads // 2, 1)


def _upper_half(values: torch.Tensor) -> torch.Tensor:
    """Bool like `values` `[rows, heads]`: the half with the greatest, lower heads first."""
    import torch

    order = values.sort(dim=-1, descending=True, stable=True).indices
    chosen = order[:, : _half(values.shape[-1])]
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, chosen, True)


def _gain(visual: torch.Tensor, enhanced: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """`sum E / sum V` over the chosen heads of each row; 1 where they see no image, or are none."""
    import torch

    before = torch.where(chosen, visual, 0.0).sum(-1, keepdim=True)
    after = torch.where(chosen, enhanced, 0.0).sum(-1, keepdim=True)
    nothing = before <= 0
    gain = torch.where(nothing, 1.0, after / torch.where(nothing, 1.0, before))
    return gain.expand_as(visual)


def _positions(spans: tuple[Span, ...]) -> IntArray:
    """Positions of all spans, in order."""
    parts = [np.arange(span.start, span.stop, dtype=np.int32) for span in spans]
    return np.concatenate(parts) if parts else np.empty(0, np.int32)
