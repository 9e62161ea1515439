"""The contract between a calibration method and the engine that applies it.

Every method rewrites the output of ordinary attention, row by row, through one formula. For
a query row with probabilities `p`, values `v` and stock output `O = sum_j p_j v_j`, and for
disjoint pools of keys `g` with mass `m_g = sum p_j` and partial value `U_g = sum p_j v_j`:

    O' = ( sum_g c_g U_g + sum_g d_g W_g + c_rest (O - sum_g U_g) ) * scale

`W_g = sum w_j p_j v_j` is the partial of a pool that carries per-key weights. A method says
which keys are pooled and turns masses into the coefficients `c`, `d`, `c_rest`, `scale`; the
engine measures, gathers and combines. No method ever sees an attention matrix.

Life of a request, in the order the engine calls:

1. `bind` in the front end, before anything reaches the engine: refuse or resolve.
2. `prefill`, `observe`, `rows` once per request: how to schedule it, what to measure, which
   rows are calibrated.
3. `resolve` once per request and layer, as soon as what it observes is known: pools, heads and
   per-head parameters. Again where a prompt is computed again, and where more becomes known.
4. `coefficients` once per layer and step, for *all* rows of this method in the step.

Methods are stateless; what belongs to a request travels in `Bound` and `LayerPlan`. Heads are
query heads of the whole model, layers are 0-based, positions are absolute in the sequence.
What a class may declare besides is in `calibrators.capabilities`.
This module imports neither torch nor numpy, so that admission stays light.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

from calibrators.observations import ColumnMeans as ColumnMeans
from calibrators.observations import HeadOutputs as HeadOutputs
from calibrators.observations import Observation as Observation
from calibrators.observations import Observed as Observed
from calibrators.observations import Prefill as Prefill
from calibrators.observations import ProbabilityBlock as ProbabilityBlock
from calibrators.observations import ResidualPeaks as ResidualPeaks

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from calibrators.settings import CalibrationSettings

    IntArray: TypeAlias = npt.NDArray[np.int32]
    FloatArray: TypeAlias = npt.NDArray[np.float32]
    BoolArray: TypeAlias = npt.NDArray[np.bool_]

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
Modality = Literal["text", "vision"]


class CalibrationError(ValueError):
    """A calibration that cannot be honoured; the client's fault, answered with a 400.

    Args:
        param: dotted path of the offending field below the method's settings, `""` for the
            method as a whole.
        message: the rule, the value and what is allowed, in one sentence for a person.
    """

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param
        self.message = message


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a method may know of the served model.

    Attributes:
        architecture: Hugging Face architecture name, such as `LlamaForCausalLM`.
        layers: number of decoder layers.
        query_heads: query heads per layer over all tensor-parallel ranks.
        kv_heads: key/value heads per layer over all ranks; divides `query_heads`.
        head_dim: channels per head; not always `hidden_size / query_heads`.
        hidden_size: width of the residual stream.
        max_model_len: context limit in tokens, prompt and answer together.
        modality: `"vision"` where the model takes images.
        config_hash: 64 hex digits over what defines the architecture, not the weights; empty where
            it is not known.
    """

    architecture: str
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    max_model_len: int
    modality: Modality = "text"
    config_hash: str = ""


@dataclass(frozen=True, slots=True)
class Bound:
    """Settings resolved against a model: all that travels from front end to worker.

    Attributes:
        method: the calibrator's name.
        params: every parameter resolved, defaults included, in the one normal form that equal
            settings share. JSON values only; it is hashed, sent to the workers and repeated
            in the receipt.
        layers: number of layers selected.
        heads: number of (layer, query head) pairs selected.
        profile: name of the profile that supplied parameters, or None.
    """

    method: str
    params: Mapping[str, Json]
    layers: int
    heads: int
    profile: str | None = None


@dataclass(frozen=True, slots=True)
class Span:
    """Positions `start <= i < stop`."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """Geometry of one prompt after image expansion.

    Attributes:
        length: number of prompt tokens `P`.
        images: spans of image tokens, in order.
        query: spans of the last user message's text, without template tokens and images.
        content: spans inside `query`, one for each word that is not a function word, in order;
            words may share a token.
        extents: each image from its first to its last token, in order. Marks that a model puts
            between the tokens of an image are inside, and cut the image into several of `images`.
            Empty where no image has any.
    """

    length: int
    images: tuple[Span, ...] = ()
    query: tuple[Span, ...] = ()
    content: tuple[Span, ...] = ()
    extents: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a request that are calibrated.

    Attributes:
        first: first calibrated position.
        skip: prompt spans after `first` that are left alone.
        generated: whether generated rows are calibrated.
    """

    first: int = 0
    skip: tuple[Span, ...] = ()
    generated: bool = True


@dataclass(frozen=True, slots=True)
class Threshold:
    """Narrows a pool, row by row, to the keys whose probability exceeds a bound.

    Attributes:
        bound: in (0, 1), or above 0 where it is relative.
        relative: the bound is divided by the number of keys up to the row, `i + 1`.
    """

    bound: float
    relative: bool = False


@dataclass(frozen=True, slots=True)
class Pool:
    """Keys pooled together in one layer.

    Attributes:
        keys: int32 `[n]`, distinct positions in ascending order; or one such array per query
            head; or a span, which may reach beyond the prompt. A row sees those not after itself
            and not hidden by a sliding window.
        weights: float32 per listed key, finite; `[n]` for all heads, or an array per query head.
        above: which of the keys count in a row; None for all.
    """

    keys: IntArray | Sequence[IntArray] | Span
    weights: FloatArray | Sequence[FloatArray] | None = None
    above: Threshold | None = None


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What one request does in one layer.

    Attributes:
        heads: bool `[query_heads]`, the heads whose output is rewritten.
        parameters: one float32 `[query_heads]` per name in `Calibrator.parameters`.
        pools: one pool per name in `Calibrator.pools`, disjoint.
        generated_pools: the pools of generated rows, where they differ from those of the prompt.
        statistics: numbers this layer adds to the receipt, averaged over layers.
        details: what the receipt shows among its statistics as `{name: {layer: value}}`.
    """

    heads: BoolArray
    parameters: Mapping[str, FloatArray] = field(default_factory=dict)
    pools: tuple[Pool, ...] = ()
    generated_pools: tuple[Pool, ...] | None = None
    statistics: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Skip:
    """A layer in which a method has nothing to do for a prompt: its documented skip, no failure.

    Where every selected layer ends like this and no row was rewritten, the receipt's `skipped` is
    the reason. More of the prompt may turn a skip into a plan, and the layer is resolved again.

    Attributes:
        reason: a sentence without a full stop, the same for all layers.
        plan: what is measured all the same, for the sake of statistics; its coefficients apply to
            no row. None leaves the layer alone.
    """

    reason: str
    plan: LayerPlan | None = None


@dataclass(frozen=True, slots=True)
class Masses:
    """Pool masses of the rows of one method in one layer and step.

    Of one tensor-parallel rank's heads, or of all for a method that looks across them.

    Attributes:
        plain: float32 `[rows, query_heads, pools]`, `m_g` in [0, 1]; 0 on heads not selected.
        rest: float32 `[rows, query_heads]`, `1 - sum_g m_g` to all digits, also where the pools
            have nearly everything; a learned attention sink is of the rest.
        weighted: like `plain`, of `sum w_j p_j`, 0 for a pool without weights; None where none has
            any.
    """

    plain: torch.Tensor
    rest: torch.Tensor
    weighted: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Coefficients:
    """The factors of the formula at the head of this module, all float32.

    Attributes:
        rest: `[rows, query_heads]`, `c_rest`.
        pools: `[rows, query_heads, pools]`, `c_g`; None without pools.
        weighted: `[rows, query_heads, pools]`, `d_g`; None without weights.
        scale: `[rows, query_heads]`, the head scale; None for 1.
        apply: bool `[rows, query_heads]`; False leaves the stock output untouched to the bit.
            None applies everywhere the plan's heads allow.
        eligible: bool `[rows, query_heads]`, what `statistics` are averaged over, among the plan's
            heads. None for what is rewritten. Only rows that are rewritten count as calibrated.
        statistics: `[rows, query_heads]` each, averaged over heads, rows and layers into the
            receipt.
    """

    rest: torch.Tensor
    pools: torch.Tensor | None = None
    weighted: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    apply: torch.Tensor | None = None
    eligible: torch.Tensor | None = None
    statistics: Mapping[str, torch.Tensor] = field(default_factory=dict)


@runtime_checkable
class Calibrator(Protocol):
    """One calibration method. A class with a no-argument constructor, without state.

    Attributes:
        name: identifier in requests, metrics and profiles: lower case, `[a-z][a-z0-9_-]*`.
        title: the method's name for people.
        paper: address of the paper.
        modality: what the method needs of the model.
        causal: a row's result depends only on keys and statistics at or before it. Where
            False, cached prompt KV is shared with no other request.
        touches_prompt_kv: keys and values of prompt tokens in later layers change, so that
            cached prompt KV is shared only between equal settings.
        reweights: changes attention weights; a request takes at most one such method, and at
            most one that only scales heads.
        revision: raised when the same settings mean something else than before.
        pools: names of the pools, in the order of `LayerPlan.pools`.
        parameters: names of the per-head parameters `coefficients` takes.
        rescales: the parameter that multiplies the method's only pool before the row is
            renormalised, where that is all it does: `c_0 = f / D`, `c_rest = 1 / D`,
            `D = 1 + (f - 1) m_0`. An engine may then compute such rows itself in one kernel, and
            reports the statistics `<pool>_mass_before` and `<pool>_mass_after`. It holds for the
            `coefficients` of the same class body: a subclass that has its own is asked. None for
            any other method.
        Settings: the strict pydantic model of the request object.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    modality: ClassVar[Modality]
    causal: ClassVar[bool]
    touches_prompt_kv: ClassVar[bool]
    reweights: ClassVar[bool]
    revision: ClassVar[int]
    pools: ClassVar[tuple[str, ...]]
    parameters: ClassVar[tuple[str, ...]]
    rescales: ClassVar[str | None]
    Settings: ClassVar[type[CalibrationSettings]]

    def bind(self, settings: CalibrationSettings, facts: ModelFacts) -> Bound:
        """Resolve settings against a model.

        Raises:
            CalibrationError: a layer, head or channel the model has not got, a parameter that
                neither request nor profile gives, a model the method does not work on.
        """
        ...

    def prefill(self, bound: Bound) -> Prefill:
        """How the prompt may be cut into steps."""
        ...

    def observe(self, bound: Bound, prompt: Prompt) -> Sequence[Observation]:
        """What to measure, before this method changes anything in the layer that is measured.

        An observation's `prefills` are the policies under which it is known in time. Asked in the
        front end, too, where the prompt is not known and has length 0: which kinds are observed in
        which layers depends on the settings alone.
        """
        ...

    def rows(self, bound: Bound, prompt: Prompt) -> Rows:
        """Which rows are calibrated."""
        ...

    def resolve(
        self, bound: Bound, layer: int, facts: ModelFacts, prompt: Prompt, observed: Observed
    ) -> LayerPlan | Skip | None:
        """Pools, heads and parameters in one layer; None where the layer is left alone.

        A `Skip` says, besides, that the method has nothing to do for this prompt in a layer that
        was selected. `observed` has what `observe` named in this layer, and all blocks of
        probabilities.
        """
        ...

    def coefficients(self, masses: Masses, parameters: Mapping[str, torch.Tensor]) -> Coefficients:
        """Coefficients from masses, for every row of this method in the step.

        Total: whatever finite masses come in, nothing is raised. A function of its arguments
        alone: an engine may trace it once and compile what it saw. Each parameter is float32
        `[rows, query_heads]`, of the same heads as the masses. Those not selected are ignored.
        """
        ...
