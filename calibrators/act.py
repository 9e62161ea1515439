"""ACT: weaken the attention that sink tokens in the middle of a prompt draw.

Paper: "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without
Training through Attention Calibration", https://arxiv.org/abs/2406.15765.

In each selected layer and query head, from the probabilities of all `P` prompt rows,

    s_j = sum_{i >= j} p_ij / (P - j)          J = { 1 <= j < P : s_j > theta },

with `theta = alpha / P`, or a threshold given outright. Key 0 is spared: the first token is a sink
that models rely on. Every row then keeps `beta` of its attention to the sinks it sees, and its
other keys share what is taken, `S_i = sum_{j in J, j <= i} p_ij`:

    p'_ij = beta p_ij   for j in J        p'_ij = p_ij (1 - beta S_i) / (1 - S_i)   otherwise.

A row that sees no sink, or next to nothing else, stays as it is; `beta = 1` changes nothing.
Generated rows keep the sinks of the prompt, find their own (`J = { j >= 1 : p_ij > theta }`, with
`alpha` over the number of keys they see), or are left alone.

`s_j` looks at later rows: a prompt comes in one step, and its KV is shared with no other request.
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
    ColumnMeans,
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
    Span,
    Threshold,
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

    from calibrators.interface import BoolArray

# As in the paper, the layers below are left alone unless a request names them.
FIRST_LAYER = 2
# Where less mass than this is left for the other keys, the row stays as it is.
NOTHING_LEFT = 1e-6


class ACTSettings(CalibrationSettings):
    """Request object of ACT."""

    method: Literal["act"] = "act"
    """Name of the calibrator."""
    beta: Annotated[float, Field(ge=0, le=1)] = 0.4
    """Share of their attention that sinks keep, 0 <= beta <= 1; 1 changes nothing."""
    alpha: Annotated[float, Field(gt=0)] = 5.0
    """A key is a sink if its mean attention is above alpha / P in a prompt of P tokens;
    alpha > 0."""
    threshold: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Mean attention above which a key is a sink, in place of alpha; 0 < threshold < 1."""
    layers: Layers | None = None
    """Decoder layers: "all" or a list of distinct 0-based layers; by default 2 to the last."""
    heads: Heads = "all"
    """Query heads: "all", a list used in every selected layer, or {layer: [heads]}."""
    decode: Literal["frozen", "row", "off"] = "frozen"
    """Generated tokens: "frozen" keeps the prompt's sinks, "row" finds each row's own by its
    attention, "off" leaves them alone."""


class ACT:
    """Attention calibration; equations at the head of the module."""

    name: ClassVar[str] = "act"
    title: ClassVar[str] = "ACT"
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.15765"
    modality: ClassVar[Modality] = "text"
    causal: ClassVar[bool] = False
    touches_prompt_kv: ClassVar[bool] = True
    reweights: ClassVar[bool] = True
    revision: ClassVar[int] = 1
    pools: ClassVar[tuple[str, ...]] = ("sinks",)
    parameters: ClassVar[tuple[str, ...]] = ("beta",)
    rescales: ClassVar[str | None] = None
    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = (("alpha", "threshold"),)
    Settings: ClassVar[type[CalibrationSettings]] = ACTSettings

    def bind(self, settings: CalibrationSettings, facts: ModelFacts) -> Bound:
        """Resolve layers, heads and what makes a sink; refuse `alpha` beside `threshold`."""
        if not isinstance(settings, ACTSettings):
            raise TypeError(f"ACT got {type(settings).__name__}")
        given = settings.threshold is not None
        if given and "alpha" in settings.model_fields_set:
            raise CalibrationError(
                "threshold", "threshold takes the place of alpha; give one of them, not both"
            )
        selection = select(_layers(settings, facts), settings.heads, facts)
        return Bound(
            method=self.name,
            params={
                "beta": settings.beta,
                "alpha": None if given else settings.alpha,
                "threshold": settings.threshold,
                "decode": settings.decode,
                **normal_form(selection, facts),
            },
            layers=len(selection),
            heads=sum(map(len, selection.values())),
        )

    def prefill(self, bound: Bound) -> Prefill:  # noqa: ARG002 - the same for all settings
        """The whole prompt: what a key draws from later rows decides about it."""
        return Prefill.WHOLE

    def observe(
        self,
        bound: Bound,
        prompt: Prompt,  # noqa: ARG002 - the same for all prompts
    ) -> tuple[Observation, ...]:
        """Column means of the selected layers and heads."""
        layers = bound.params["layers"]
        chosen = cast("list[int]", layers) if isinstance(layers, list) else range(bound.layers)
        return tuple(_means(bound, layer) for layer in chosen)

    def rows(self, bound: Bound, prompt: Prompt) -> Rows:  # noqa: ARG002
        """Every row of the prompt, and generated ones unless `decode` is "off"."""
        return Rows(generated=bound.params["decode"] != "off")

    def resolve(
        self, bound: Bound, layer: int, facts: ModelFacts, prompt: Prompt, observed: Observed
    ) -> LayerPlan | None:
        """One pool, the sinks of each head; heads without any are left alone.

        The statistic `sinks` is a layer's number of sinks over the mean number of heads selected
        per layer, so that its mean over layers is the mean over all selected heads.
        """
        chosen = selected_heads(bound.params, layer, facts)
        if not chosen:
            return None
        heads = np.zeros(facts.query_heads, np.bool_)
        heads[chosen] = True
        theta = np.float64(_theta(bound, prompt.length))
        sinks: BoolArray = (observed[_means(bound, layer)] > theta) & heads[:, None]
        sinks[:, 0] = False
        generated = _per_row(bound, facts)
        return LayerPlan(
            heads if generated else np.any(sinks, axis=1),
            {"beta": np.full(facts.query_heads, bound.params["beta"], np.float32)},
            (Pool([np.flatnonzero(each).astype(np.int32) for each in sinks]),),
            generated,
            {"sinks": float(sinks.sum()) * bound.layers / bound.heads},
        )

    def coefficients(self, masses: Masses, parameters: Mapping[str, torch.Tensor]) -> Coefficients:
        """`c_J = beta`, `c_rest = (1 - beta S) / (1 - S)`."""
        import torch  # the contract is importable without it, admission too

        mass, beta = masses.plain[..., 0], parameters["beta"]
        nothing_left = masses.rest < NOTHING_LEFT
        left = torch.where(nothing_left, 1.0, masses.rest)
        return Coefficients(
            rest=1 + (1 - beta) * mass / left,  # the same, and exactly 1 at beta 1
            pools=beta[..., None],
            # A mass that is not finite passes, so that the engine finds it and fails the request.
            apply=(mass != 0) & ~nothing_left,
            statistics={"sink_mass_before": mass, "sink_mass_after": beta * mass},
        )


def _layers(settings: ACTSettings, facts: ModelFacts) -> Layers:
    if settings.layers is not None:
        return settings.layers
    if facts.layers <= FIRST_LAYER:
        raise CalibrationError(
            "layers",
            f"layers defaults to {FIRST_LAYER} and above, but the model has {facts.layers}: "
            f"name some of 0 to {facts.layers - 1}",
        )
    return list(range(FIRST_LAYER, facts.layers))


def _means(bound: Bound, layer: int) -> ColumnMeans:
    """What is observed in a selected layer."""
    heads = bound.params["heads"]
    chosen = heads[str(layer)] if isinstance(heads, dict) else heads
    return ColumnMeans(layer, tuple(cast("list[int]", chosen)) if chosen != "all" else None)


def _theta(bound: Bound, keys: int) -> float:
    """Attention above which one of so many keys is a sink."""
    threshold = cast("float | None", bound.params["threshold"])
    return cast("float", bound.params["alpha"]) / keys if threshold is None else threshold


def _per_row(bound: Bound, facts: ModelFacts) -> tuple[Pool, ...] | None:
    """Pools of generated rows that find their own sinks; None where the prompt's are kept."""
    if bound.params["decode"] != "row":
        return None
    threshold = cast("float | None", bound.params["threshold"])
    above = Threshold(_theta(bound, 1), relative=threshold is None)
    return (Pool(Span(1, facts.max_model_len), above=above),)
