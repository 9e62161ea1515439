"""The shape that all kinds of observation share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

import torch

from server.engine.batch import prompt_rows
from server.kernels import dispatch as kernels

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from calibrators.interface import FloatArray, Observation
    from server.engine.batch import Member
    from server.kernels.partials import AttentionGeometry, PagedCache, RowMap, StridedCache


@dataclass(frozen=True, slots=True)
class View:
    """A layer in the middle of a step, before a method rewrites its output.

    Attributes:
        query: `[tokens, query_heads, head_dim]`.
        output: of the same shape, as the methods before have left it.
        cache: the layer's pages, this step's keys and values among them.
        geometry: how logits are formed.
        prompts: maps rows of prompts; those of a step are the same in every layer.
    """

    query: Tensor
    output: Tensor
    cache: PagedCache | StridedCache
    geometry: AttentionGeometry
    prompts: Callable[[Sequence[Member]], RowMap] = prompt_rows

    def attention(
        self, rows: RowMap, chosen: Sequence[Sequence[int] | slice] = (slice(None),)
    ) -> kernels.Attention:
        """Unmodified attention of some rows; on the chosen heads, by slot, or all of one slot."""
        heads = torch.zeros(len(chosen), self.query.shape[1], dtype=torch.bool)
        for slot, own in enumerate(chosen):
            heads[slot, own] = True
        return kernels.attention(self.query, self.cache, rows, heads, self.geometry)


class Tap(Protocol):
    """One observation of one request, measured while its prompt goes by.

    Attributes:
        layer: where it is measured.
        local: resolves its own layer, right there; otherwise every layer, before the last prompt
            row.
        by_head: measured per query head, by each rank on its own; otherwise of what all ranks have.
    """

    layer: int
    local: bool
    by_head: bool

    @property
    def observation(self) -> Observation:
        """What the calibrator asked for."""
        ...

    def due(self, start: int, stop: int) -> bool:
        """Whether there is something to measure in prompt rows `start <= i < stop`."""
        ...

    @classmethod
    def take(cls, due: Sequence[tuple[Member, Self]], view: View) -> None:
        """Measure what is due in a step, for all its requests."""
        ...

    def value(self) -> FloatArray | None:
        """What the calibrator gets to see, handed out once; None while anything is missing."""
        ...
