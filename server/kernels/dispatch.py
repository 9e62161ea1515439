"""The kernels of whatever device a layer's cache lies on.

Neither numba nor Triton is imported before it is needed: each is of no use on the other's device.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from server.kernels.partials import (
    NO_ROWS,
    Array,
    AttentionGeometry,
    Changes,
    PagedCache,
    Partials,
    PoolMap,
    PoolTable,
    RowMap,
    StridedCache,
)


class Attention(Protocol):
    """The calibrated rows of one layer's attention; what `cpu.Attention` documents."""

    def column_means(self) -> Tensor:
        """Mean probability of each key of a prompt; float32 `[query_heads, rows]`."""
        ...

    def probabilities(self, keys: Array) -> Tensor:
        """Probabilities of some keys; float32 `[query_heads, rows, keys]`."""
        ...

    def pool_partials(self, pools: PoolMap | PoolTable) -> Partials:
        """Mass and value sum of each pool and of the rest."""
        ...

    def rescale(
        self, output: Tensor, pools: PoolMap, factor: Tensor, computed: Tensor, changes: Changes
    ) -> None:
        """Multiply a pool's probabilities by a factor and renormalise, in place."""
        ...


def attention(
    query: Tensor,
    cache: PagedCache | StridedCache,
    rows: RowMap,
    heads: Tensor,
    geometry: AttentionGeometry,
    stock: Tensor | None = None,
) -> Attention:
    """The kernels that read `cache`.

    Args:
        query: `[tokens, query_heads, head_dim]`.
        cache: the layer's pages.
        rows: which rows, on the host.
        heads: bool `[slots, query_heads]`, the heads to measure and to rewrite.
        geometry: how logits are formed.
        stock: natural log-sum-exps `[query_heads, tokens]` of the stock kernel; None where it gives
            none, as on the CPU.
    """
    if isinstance(cache, PagedCache):
        from server.kernels import cpu

        return cpu.Attention(query, cache, rows, heads, geometry)
    from server.kernels import gpu

    return gpu.Attention(query, cache, rows, heads, geometry, stock)


def combine(
    output: Tensor,
    rows: RowMap,
    heads: Tensor,
    partials: Partials,
    factors: Tensor,
    computed: Tensor = NO_ROWS,
) -> Tensor:
    """Rewrite rows in place from their partials; `cpu.combine` documents it.

    None are `computed` on an accelerator, whose stock kernel always runs.
    """
    if output.device.type == "cpu":
        from server.kernels import cpu

        return cpu.combine(output, rows, heads, partials, factors, computed)
    from server.kernels import gpu

    return gpu.combine(output, rows, heads, partials, factors)
