"""Random attention problems in a paged cache, and the dense view of the same tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calibrators import reference
from server.kernels import cpu
from server.kernels.partials import (
    AttentionGeometry,
    PagedCache,
    Partials,
    PoolMap,
    PoolTable,
    RowMap,
)


@dataclass
class Problem:
    """One step: some requests, each with the last `spans[i]` rows of `lengths[i]` tokens."""

    query: Tensor
    cache: PagedCache
    rows: RowMap
    keys: list[Tensor]
    values: list[Tensor]
    spans: list[int]
    geometry: AttentionGeometry

    def dense(self, request: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """Probabilities `[rows, heads, keys]` of a request's rows, and their positions."""
        length, span = self.keys[request].shape[0], self.spans[request]
        positions = torch.arange(length - span, length)
        start = sum(self.spans[:request])
        geometry = reference.Geometry(
            self.geometry.scale,
            self.geometry.soft_cap,
            self.geometry.window or None,
            self.geometry.alibi_slopes.to(dtype) if len(self.geometry.alibi_slopes) else None,
            self.geometry.sinks.to(dtype) if len(self.geometry.sinks) else None,
        )
        query = self.query[start : start + span].to(dtype)
        key = self.keys[request].to(dtype)
        return reference.probabilities(query, key, positions, geometry), positions


def attention(case: Problem, heads: Tensor) -> cpu.Attention:
    """What the CPU kernels read of a problem."""
    return cpu.Attention(case.query, case.cache, case.rows, heads, case.geometry)


# The two ways of the CPU kernels to measure pools.
WAYS = ("divided", "kept")


def measured(case: Problem, heads: Tensor, pools: PoolMap | PoolTable, way: str) -> Partials:
    """Partials of a problem in a way of `WAYS`."""
    found: Partials = getattr(attention(case, heads), way)(pools)
    return found


def values(case: Problem, found: Partials) -> Tensor:
    """Value sums by column; where none were made, from combinations that keep a column each."""
    if not isinstance(found, cpu.Kept):
        return found.value
    touched = torch.ones(found.mass.shape[:2], dtype=torch.bool)
    whole, columns = stock(case).float(), []
    for column in range(found.mass.shape[2]):
        factors = torch.zeros_like(found.mass)
        factors[..., column] = 1
        output = whole.clone()
        assert cpu.combine(output, case.rows, touched, found, factors).all()
        columns.append(torch.where(found.mass.any(-1, keepdim=True), output, 0))
    return torch.stack(columns, 2)


def stock(case: Problem, dtype: torch.dtype = torch.float64) -> Tensor:
    """Attention that nobody calibrates, `[rows, heads, head_dim]`."""
    each = [
        reference.attend(case.dense(request, dtype)[0], value.to(dtype))
        for request, value in enumerate(case.values)
    ]
    return torch.cat(each)


def row_map(spans: list[int], lengths: list[int], tile: int) -> RowMap:
    """All rows of all requests, in the order of the batch."""
    token = torch.arange(sum(spans))
    request = torch.repeat_interleave(
        torch.arange(len(spans), dtype=torch.int32), torch.tensor(spans)
    )
    position = torch.cat(
        [torch.arange(n - s, n, dtype=torch.int32) for s, n in zip(spans, lengths, strict=True)]
    )
    edges, start = [0], 0
    for span in spans:
        edges += [min(start + t, start + span) for t in range(tile, span + tile, tile)]
        start += span
    return RowMap(token, request, request, position, torch.tensor(edges, dtype=torch.int32))


def problem(
    lengths: list[int],
    spans: list[int],
    *,
    dtype: torch.dtype = torch.float32,
    heads: int = 6,
    kv_heads: int = 2,
    head_dim: int = 32,
    block: int = 32,
    tile: int = 16,
    seed: int = 0,
    soft_cap: float = 0.0,
    window: int = 0,
    alibi: bool = False,
    sinks: bool = False,
) -> Problem:
    """Random queries, keys and values, the latter scattered over shuffled pages."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    keys = [normal(n, kv_heads, head_dim) for n in lengths]
    values = [normal(n, kv_heads, head_dim) for n in lengths]
    per_request = max(-(-n // block) for n in lengths)
    order = torch.randperm(len(lengths) * per_request + 1, generator=generator)
    table = order[:-1].view(len(lengths), per_request).int()
    pages = torch.full((len(order), kv_heads, 2, head_dim * block), float("nan"), dtype=dtype)
    for request, (key, value) in enumerate(zip(keys, values, strict=True)):
        for j in range(key.shape[0]):
            page = pages[table[request, j // block]]
            page[:, 0].view(kv_heads, head_dim, block)[:, :, j % block] = key[j]
            page[:, 1].view(kv_heads, block, head_dim)[:, j % block] = value[j]
    geometry = AttentionGeometry(
        scale=head_dim**-0.5,
        soft_cap=soft_cap,
        window=window,
        alibi_slopes=torch.rand(heads if alibi else 0, generator=generator),
        sinks=torch.randn(heads if sinks else 0, generator=generator),
    )
    return Problem(
        normal(sum(spans), heads, head_dim),
        PagedCache(pages, table),
        row_map(spans, lengths, tile),
        keys,
        values,
        spans,
        geometry,
    )
