"""The shape that all kinds of observation share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from server.kernels import dispatch as kernels

if TYPE_CHECKING:
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
    """

    query: Tensor
    output: Tensor
    cache: PagedCache | StridedCache
    geometry: AttentionGeometry

    def attention(self, rows: RowMap, chosen: list[int] | None = None) -> kernels.Attention:
        """Unmodified attention of some rows of one request, on the chosen heads or all."""
        heads = torch.zeros(1, self.query.shape[1], dtype=torch.bool)
        heads[:, slice(None) if chosen is None else chosen] = True
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

    def take(self, member: Member, view: View) -> None:
        """Measure what is due in a step."""
        ...

    def value(self) -> FloatArray | None:
        """What the calibrator gets to see, handed out once; None while anything is missing."""
        ...
