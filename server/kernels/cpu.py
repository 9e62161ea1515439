"""Pool partials and combine on the CPU, over vLLM's paged cache of the `vec` layout.

Logits of a tile are formed page by page against keys stored column-major, up to 6 queries at a
time, and go into running log-sum-exps without leaving the registers: the stock kernel returns
none. That reads K once and V not at all; then only pooled keys are read again.

bfloat16 and float16 come in as their bit patterns, since numpy has no bfloat16 and numba
computes with neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from server.kernels import (
    cpu_columns,
    cpu_masses,
    cpu_partials,
    cpu_pools,
    cpu_probabilities,
    cpu_rescale,
    cpu_weighing,
)
from server.kernels.cpu_product import PAIRS
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
)

_BITS = {torch.float32: None, torch.bfloat16: torch.uint16, torch.float16: torch.int16}

# Bytes of probabilities that may be kept from masses to values.
MOST_KEPT = 32 << 20


@dataclass(frozen=True, slots=True)
class Kept(Partials):
    """Masses of single rows, and every probability they are of: `value` has no columns yet.

    Attributes:
        probability: what `cpu_masses` keeps.
        source: what `cpu_weighing` takes of the layer.
    """

    probability: Array
    source: tuple[Any, ...]


class Attention:
    """The calibrated rows of one layer's attention, as the kernels read them.

    Args:
        query: `[tokens, query_heads, head_dim]`, any floating dtype; tokens may lie apart.
        cache: the layer's pages.
        rows: which rows.
        heads: bool `[slots, query_heads]`, the heads to measure and to rewrite.
        geometry: how logits are formed.
    """

    def __init__(
        self,
        query: Tensor,
        cache: PagedCache,
        rows: RowMap,
        heads: Tensor,
        geometry: AttentionGeometry,
    ) -> None:
        self._shape = (rows.token.shape[0], *query.shape[1:])
        self._query = _in_pairs(*_flat(query))
        self._pages = _bits(cache.pages)
        self._block = cache.extent(query.shape[2])[1]
        self._table = cache.block_table.numpy()
        self._rows, self._map = rows.arrays, rows
        self._heads = heads.numpy()
        self._model = geometry.in_base_2

    @cached_property
    def log_sum_exp(self) -> Tensor:
        """`log2 sum_j 2^s_ij` of the base-2 logits, learned sinks included; reads every key once.

        float32 `[rows, query_heads]`, undefined on heads that are not selected.
        """
        rows, query_heads, head_dim = self._shape
        out = torch.empty(rows, query_heads)
        nothing = PoolTable.none(len(self._heads), query_heads)
        self._divide(nothing, out, Partials.empty(nothing, rows, query_heads, head_dim))
        return out

    def column_means(self) -> Tensor:
        """Mean probability each key gets from the rows that can see it; reads every key again.

        The rows of a slot are its prompt, positions `0 <= i < P` in order. Column `r` of the result
        is the key at the position of row `r`: `s_j = sum_{i >= j} p_ij / (P - j)`. float32
        `[query_heads, rows]`, zero on heads that are not selected.
        """
        rows, query_heads, head_dim = self._shape
        out = torch.zeros(query_heads, rows)
        _run(
            cpu_columns.serial,
            cpu_columns.parallel,
            *self._query,
            self._pages,
            head_dim,
            self._table,
            self._rows,
            self._heads,
            self._model,
            self.log_sum_exp.numpy(),
            out.numpy(),
        )
        return out

    def probabilities(self, keys: Array) -> Tensor:
        """`p_ij` of some keys, whatever the rows' requests; 0 where a row does not see a key.

        float32 `[query_heads, rows, keys]`, zero on heads that are not selected.

        Args:
            keys: int32 `[n]`, positions.
        """
        rows, query_heads, head_dim = self._shape
        out = torch.zeros(query_heads, rows, len(keys))
        _run(
            cpu_probabilities.serial,
            cpu_probabilities.parallel,
            *self._query,
            self._pages,
            head_dim,
            self._table,
            self._rows,
            self._heads,
            self._model,
            self.log_sum_exp.numpy(),
            keys,
            out.numpy(),
        )
        return out

    def pool_partials(self, pools: PoolMap | PoolTable) -> Partials:
        """Mass and value sum of each pool and of the rest, zero on heads that are not selected.

        Rows that share their keys are divided in one pass; others in two, which reads few values.
        """
        table = self._of_heads(pools)
        if table.pools and self._map.single and 4 * math.prod(self._kept_shape) <= MOST_KEPT:
            return self.kept(table)
        return self.divided(table)

    def divided(self, pools: PoolMap | PoolTable) -> Partials:
        """Masses and value sums, whatever the rows."""
        table, (rows, query_heads, head_dim) = self._of_heads(pools), self._shape
        found = Partials.empty(table, rows, query_heads, head_dim)
        if table.pools:
            self._divide(table, self.log_sum_exp if table.narrowed else torch.empty(0, 0), found)
        return found

    def kept(self, pools: PoolMap | PoolTable) -> Kept:
        """Masses, and probabilities of which `combine` makes value sums; row by row."""
        table, (rows, query_heads, head_dim) = self._of_heads(pools), self._shape
        mass = torch.empty(rows, query_heads, table.columns)
        probability = np.empty(self._kept_shape, np.float32)
        _run(
            cpu_masses.serial,
            cpu_masses.parallel,
            *self._given(table),
            probability,
            mass.numpy(),
        )
        source = self._pages, self._table, self._rows, table.arrays, self._heads, self._model[0][2]
        value = torch.empty(rows, query_heads, 0, head_dim)
        return Kept(table.pools, mass, value, probability, source)

    def _of_heads(self, pools: PoolMap | PoolTable) -> PoolTable:
        return PoolTable.of(pools, self._shape[1]) if isinstance(pools, PoolMap) else pools

    @cached_property
    def _kept_shape(self) -> tuple[int, ...]:
        """`[rows, kv_heads, pages, group, block]`, pages as many as the longest row sees."""
        rows, query_heads, _ = self._shape
        kv_heads, window = self._pages.shape[1], self._model[0][2]
        pages = self._map.last // self._block + 1
        if window > 0:
            pages = min(pages, (window - 1) // self._block + 2)
        return rows, kv_heads, pages, query_heads // kv_heads, self._block

    def _divide(self, pools: PoolTable, log_sum_exp: Tensor, found: Partials) -> None:
        _run(
            cpu_partials.serial,
            cpu_partials.parallel,
            *self._given(pools),
            log_sum_exp.numpy(),
            found.mass.numpy(),
            found.value.numpy(),
        )

    def rescale(
        self, output: Tensor, pools: PoolMap, factor: Tensor, computed: Tensor, changes: Changes
    ) -> None:
        """Multiply a pool's probabilities by a factor and renormalise, in place and in one pass.

        `pool_partials`, `c_0 = f / D`, `c_rest = 1 / D` with `D = 1 + (f - 1) m_0`, and `combine`
        in one; or attention itself, with `log f` added to the logits of the pool. A row that sees
        none of the pool, or nothing else, stays as it is.

        Args:
            output: `[tokens, query_heads, head_dim]`, the stock output.
            pools: which keys; one pool per slot.
            factor: float32 `[slots, query_heads]`, `f > 0`.
            computed: bool `[slots]`, where `output` holds nothing yet: attention is computed for
                all heads, and rescaled on the selected ones.
            changes: what is done is added here.
        """
        _run(
            cpu_rescale.serial,
            cpu_rescale.parallel,
            *self._given(pools),
            factor.numpy(),
            computed.numpy(),
            _bits(output),
            changes.arrays,
        )

    def _given(self, pools: PoolMap | PoolTable) -> tuple[Any, ...]:
        given = (self._pages, self._table, self._rows, pools.arrays, self._heads, self._model)
        return *self._query, *given


def combine(
    output: Tensor,
    rows: RowMap,
    heads: Tensor,
    partials: Partials,
    factors: Tensor,
    computed: Tensor = NO_ROWS,
) -> Tensor:
    """Rewrite rows in place, in float32: `O' = sum_g c_g U_g + sum_g d_g W_g + c_rest R`.

    Returns bool `[rows]`: False where a result was not finite; such a head keeps its stock output.

    Args:
        output: `[tokens, query_heads, head_dim]`, the stock output, which is `R` without pools.
        rows: which rows.
        heads: bool `[rows, query_heads]`; others keep every bit, and so do those whose factors
            are neutral, `c_g = c_rest = 1` and `d_g = 0`.
        partials: of the same rows.
        factors: float32 `[rows, query_heads, columns]`, by column `c_g`, `d_g` and `c_rest`.
        computed: bool `[rows]`, where `output` holds nothing yet and all heads were measured, which
            are all written; empty for none. Where a result is not finite they are zero.
    """
    finite = torch.ones(len(rows.token), dtype=torch.bool)
    if isinstance(partials, Kept):
        _run(
            cpu_weighing.serial,
            cpu_weighing.parallel,
            _bits(output),
            *partials.source,
            partials.probability,
            heads.numpy(),
            factors.numpy(),
            computed.numpy(),
            finite.numpy(),
        )
        return finite
    _run(
        cpu_pools.combine_serial,
        cpu_pools.combine_parallel,
        _bits(output),
        rows.token.numpy(),
        heads.numpy(),
        partials.value.numpy(),
        factors.numpy(),
        partials.pools,
        computed.numpy(),
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
    attention = Attention(tokens, cache, rows, heads, geometry)
    attention.column_means()
    attention.probabilities(index.numpy())
    for partials in (attention.divided(pools), attention.kept(pools)):
        combine(tokens, rows, heads, partials, partials.mass)
    factor = partials.mass[..., 0].contiguous()
    attention.rescale(tokens, pools, factor, heads[:, 0].contiguous(), Changes.none(1, query_heads))


def set_threads(count: int) -> None:
    """Use as many threads as the rest of the engine does."""
    numba.set_num_threads(max(1, min(count, numba.config.NUMBA_NUM_THREADS)))
    _threads.cache_clear()


@lru_cache(maxsize=1)
def _threads() -> int:
    """numba's own answer takes longer than it should between two kernels."""
    return int(numba.get_num_threads())


def _run(serial: Callable[..., None], parallel: Callable[..., None], *args: object) -> None:
    """One thread goes without the scheduler of threads, which takes longer than a small batch."""
    threads = _threads()
    if threads == 1:
        serial(0, 1, *args)
    else:
        parallel(threads, *args)


def _bits(tensor: Tensor) -> Array:
    bits = _BITS[tensor.dtype]
    array: Array = (tensor if bits is None else tensor.view(bits)).numpy()
    return array


def _flat(query: Tensor) -> tuple[Array, int]:
    """All elements in one line, and how far tokens are apart: a slice of the fused projection."""
    tokens, heads, head_dim = query.shape
    stride = query.stride(0)
    if query.stride()[1:] != (head_dim, 1):
        query, stride = query.contiguous(), heads * head_dim
    return _bits(query.as_strided(((tokens - 1) * stride + heads * head_dim,), (1,))), stride


def _in_pairs(query: Array, stride: int) -> tuple[Array, int]:
    """bfloat16 two by two where the host multiplies them so; heads and tokens begin at even
    elements."""
    if PAIRS and query.dtype == np.uint16:
        return query.view(np.uint32), stride // 2
    return query, stride
