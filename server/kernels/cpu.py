"""Pool partials and combine on the CPU, over vLLM's paged cache of the `vec` layout.

Logits of a tile are formed page by page against keys stored column-major, 32 keys and 6 queries
at a time in registers; no context is gathered. The log-sum-exp the stock kernel does not return
is accumulated on the way (one read of K, none of V), then only pooled keys are read again.

bfloat16 and float16 come in as their bit patterns, since numpy has no bfloat16 and numba
computes with neither.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from server.kernels import cpu_loops
from server.kernels.partials import (
    AttentionGeometry,
    PagedCache,
    Partials,
    PoolMap,
    RowMap,
)

_BITS = {torch.float32: None, torch.bfloat16: torch.uint16, torch.float16: torch.int16}


def pool_partials(
    query: Tensor,
    cache: PagedCache,
    rows: RowMap,
    pools: PoolMap,
    heads: Tensor,
    geometry: AttentionGeometry,
) -> Partials:
    """Mass and value sum of each pool, for the selected heads of each row.

    Args:
        query: `[tokens, query_heads, head_dim]`, any floating dtype.
        cache: the layer's pages.
        rows: which rows.
        pools: which keys.
        heads: bool `[slots, query_heads]`, the heads to measure.
        geometry: how logits are formed.
    """
    count, query_heads, head_dim = rows.token.shape[0], query.shape[1], query.shape[2]
    mass = torch.empty(count, query_heads, pools.pools)
    value = torch.empty(count, query_heads, pools.pools, head_dim)
    cpu_loops.partials(
        _bits(query.contiguous()),  # a slice of the fused projection would compile anew
        np.float32(geometry.scale),
        _bits(cache.pages),
        cache.block_table.numpy(),
        _row_arrays(rows),
        pools.keys.numpy(),
        pools.offsets.numpy(),
        heads.numpy(),
        (np.float32(geometry.soft_cap), geometry.window),
        geometry.alibi_slopes.numpy(),
        geometry.sinks.numpy(),
        mass.numpy(),
        value.numpy(),
    )
    return Partials(mass, value)


def combine(
    output: Tensor,
    rows: RowMap,
    heads: Tensor,
    partials: Partials,
    factors: Tensor,
    rest: Tensor,
) -> Tensor:
    """Rewrite rows in place: `O' = sum_g c_g U_g + c_rest (O - sum_g U_g)`, in float32.

    Returns bool `[rows]`: False where a result was not finite; such a head keeps its stock output.

    Args:
        output: `[tokens, query_heads, head_dim]`, the stock output.
        rows: which rows.
        heads: bool `[rows, query_heads]`; others keep every bit.
        partials: pools of the same rows.
        factors: float32 `[rows, query_heads, pools]`, `c_g`.
        rest: float32 `[rows, query_heads]`, `c_rest`.
    """
    finite = torch.ones(len(rows.token), dtype=torch.bool)
    cpu_loops.combine(
        _bits(output),
        rows.token.numpy(),
        heads.numpy(),
        partials.value.numpy(),
        factors.numpy(),
        rest.numpy(),
        finite.numpy(),
    )
    return finite


def warm_up(dtype: torch.dtype, query_heads: int, kv_heads: int, head_dim: int, block: int) -> None:
    """Compile for these types now, in seconds, or read the compiler's cache on disk."""
    index = torch.zeros(1, dtype=torch.int32)
    cache = PagedCache(torch.zeros(1, kv_heads, 2, head_dim * block, dtype=dtype), index.view(1, 1))
    rows = RowMap(index.long(), index, index, index, torch.tensor([0, 1], dtype=torch.int32))
    pools = PoolMap(index, torch.tensor([[0, 1]], dtype=torch.int32))
    none = torch.empty(0)
    heads = torch.ones(1, query_heads, dtype=torch.bool)
    tokens = torch.zeros(1, query_heads, head_dim, dtype=dtype)
    geometry = AttentionGeometry(1.0, 0.0, 0, none, none)
    partials = pool_partials(tokens, cache, rows, pools, heads, geometry)
    combine(tokens, rows, heads, partials, partials.mass, partials.mass[..., 0].contiguous())


def set_threads(count: int) -> None:
    """Use as many threads as the rest of the engine does."""
    numba.set_num_threads(max(1, min(count, numba.config.NUMBA_NUM_THREADS)))


def _bits(tensor: Tensor) -> npt.NDArray[Any]:
    bits = _BITS[tensor.dtype]
    array: npt.NDArray[Any] = (tensor if bits is None else tensor.view(bits)).numpy()
    return array


def _row_arrays(rows: RowMap) -> tuple[npt.NDArray[Any], ...]:
    fields = (rows.token, rows.request, rows.slot, rows.position, rows.tiles)
    return tuple(field.numpy() for field in fields)
