"""What a method may ask the engine to measure, and how its prompt must come for that.

Part of the contract in `calibrators.interface`, which has these names too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, ClassVar, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from calibrators.interface import Span


class Prefill(Enum):
    """How a prompt may be cut into steps.

    Under anything but `ANY`, cached KV is shared with no other request: what a row holds depends
    on where its prompt ends.
    """

    ANY = "any"
    """Any chunks: a row depends only on keys and statistics at or before it."""
    WHOLE = "whole"
    """One step for the whole prompt: statistics look at later rows."""
    SPLIT_LAST = "split_last"
    """The last prompt token is a step of its own, after everything before it."""


@dataclass(frozen=True, slots=True)
class ColumnMeans:
    """Mean attention each prompt key receives from the prompt rows that can see it.

    Yields float32 `[query_heads, P]`, `s_j = sum_{i >= j} p_ij / (P - j)`, to resolve its layer;
    zero for query heads other than `heads`, None for all. Every head costs a pass over the keys.
    """

    layer: int
    heads: tuple[int, ...] | None = None
    prefills: ClassVar[frozenset[Prefill]] = frozenset({Prefill.WHOLE})


@dataclass(frozen=True, slots=True)
class ProbabilityBlock:
    """Probabilities of some prompt rows and keys, in one layer, to resolve every layer.

    Yields float32 `[query_heads, rows, keys]`, the keys of all spans in order, 0 where a row does
    not see a key. The last prompt token is computed by itself, when the block is complete; only
    rows from it on can be calibrated.

    Attributes:
        rows: prompt positions in ascending order, all before the last.
        keys: spans within the prompt.
    """

    layer: int
    rows: tuple[int, ...]
    keys: tuple[Span, ...]
    prefills: ClassVar[frozenset[Prefill]] = frozenset({Prefill.SPLIT_LAST})


@dataclass(frozen=True, slots=True)
class ResidualPeaks:
    """Peak of some channels of the residual stream entering a layer, before its norm.

    Yields float32 `[P]`, `max_{d in channels} |x_d| / sqrt(mean_k x_k^2 + 1e-6)`, to resolve its
    layer. In a prompt that comes in pieces the layer is resolved after every piece, for the rows
    of that piece and later ones; positions that are not computed yet read 0, and so do those that
    a sliding window hides from all these rows. Cached KV with which peaks come must be that of
    equal settings: a method that asks for them touches prompt KV.
    """

    layer: int
    channels: tuple[int, ...]
    prefills: ClassVar[frozenset[Prefill]] = frozenset(Prefill)


@dataclass(frozen=True, slots=True)
class HeadOutputs:
    """Per-head outputs of the last prompt row before the output projection, to resolve its layer.

    Yields float32 `[query_heads, head_dim]`, weights calibrated and heads not yet scaled. Where the
    last prompt token is computed by itself, only rows from it on can be calibrated. With
    `without_images` they come from an extra plain prefill of the prompt without its image tokens.
    """

    layer: int
    without_images: bool = False
    prefills: ClassVar[frozenset[Prefill]] = frozenset({Prefill.WHOLE, Prefill.SPLIT_LAST})


Observation: TypeAlias = ColumnMeans | ProbabilityBlock | ResidualPeaks | HeadOutputs
Observed: TypeAlias = "Mapping[Observation, npt.NDArray[np.float32]]"
