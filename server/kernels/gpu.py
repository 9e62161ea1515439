"""Pool partials and combine on a GPU, over paged caches of any strides, in Triton.

What `server.kernels.cpu` is for the CPU, with the same names. Nothing here waits for the device.
Keys of long rows are split over programs where a step has too few rows to keep a GPU busy, so the
last bits of a calibrated row may depend on how many calibrated rows share its step.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from server.kernels import (
    gpu_columns,
    gpu_combine,
    gpu_partials,
    gpu_probabilities,
    gpu_rescale,
)
from server.kernels.gpu_launch import (
    FEW_KEYS,
    Form,
    Launch,
    keys_at_once,
    power_of_2,
    strided,
    warps,
)
from server.kernels.gpu_tables import DevicePools, DeviceRows
from server.kernels.partials import (
    TILE,
    Array,
    AttentionGeometry,
    Changes,
    Partials,
    PoolMap,
    PoolTable,
    RowMap,
    StridedCache,
)

# What `divide` leaves: peaks, totals and value sums, and the keys of a split.
Sums = tuple[tuple[Tensor, Tensor, Tensor], int]


class Attention:
    """The calibrated rows of one layer's attention, as the kernels read them.

    Args:
        query: `[tokens, query_heads, head_dim]`, of the cache's dtype; channels side by side.
        cache: the layer's pages.
        rows: which rows, on the host; those with the token -1 are left alone.
        heads: bool `[slots, query_heads]`, the heads to measure and to rewrite.
        geometry: how logits are formed.
        stock: natural log-sum-exps `[query_heads, tokens]` of the stock kernel, float32, learned
            sinks included; None where it gives none.
    """

    def __init__(
        self,
        query: Tensor,
        cache: StridedCache,
        rows: RowMap,
        heads: Tensor,
        geometry: AttentionGeometry,
        stock: Tensor | None = None,
    ) -> None:
        self._device = query.device
        self._query, self._stock = query, stock
        self._rows = DeviceRows.of(rows, self._device)
        self._heads = heads.to(self._device, non_blocking=True).view(torch.uint8)
        self._form = Form.of(query, cache, geometry)
        self._launch = Launch(self._form, self._rows)
        self._model = self._form.model(geometry, self._device)
        self._cache = self._form.cache(cache)

    @cached_property
    def log_sum_exp(self) -> Tensor:
        """`log2 sum_j 2^s_ij` of the base-2 logits, learned sinks included.

        float32 `[rows, query_heads]`, undefined on heads that are not selected. Taken from the
        stock kernel where that gave it; else every key is read once.
        """
        if self._stock is not None:
            token = self._rows.tensors[0].clamp(min=0)
            natural: Tensor = self._stock[:, token]
            return natural.T.contiguous() / math.log(2)
        nothing = DevicePools.of(PoolTable.none(1, 1), 1, self._device)
        return self._reduced(nothing, self._divided(nothing, None, values=False), values=False)[2]

    def column_means(self) -> Tensor:
        """Mean probability each key gets from the rows that can see it; reads every key again.

        The rows of a slot are its prompt, positions `0 <= i < P` in order. Column `r` of the result
        is the key at the position of row `r`: `s_j = sum_{i >= j} p_ij / (P - j)`. float32
        `[query_heads, rows]`, zero on heads that are not selected.
        """
        rows, query_heads = self._rows, self._form.query_heads
        out = torch.zeros(query_heads, rows.count, device=self._device)
        if not rows.count:
            return out
        gpu_columns.column_means[(rows.tiles, query_heads)](
            *self._given(self._heads),
            rows.ends,
            self.log_sum_exp,
            out,
            rows.count,
            FORM=self._form.constants(TILE),
            LANES=(TILE, TILE),
        )
        return out

    def probabilities(self, keys: Array) -> Tensor:
        """`p_ij` of some keys, whatever the rows' requests; 0 where a row does not see a key.

        float32 `[query_heads, rows, keys]`, zero on heads that are not selected.

        Args:
            keys: int32 `[n]`, positions, on the host.
        """
        rows = self._rows
        out = torch.zeros(self._form.query_heads, rows.count, len(keys), device=self._device)
        if not out.numel():
            return out
        lanes, parts = self._launch.lanes(1)
        blocks = -(-len(keys) // self._form.block_n)
        gpu_probabilities.probabilities[(rows.tiles * parts, self._form.kv_heads, blocks)](
            *self._given(self._heads),
            self.log_sum_exp,
            torch.from_numpy(keys).to(self._device, non_blocking=True),
            out,
            parts,
            rows.count,
            len(keys),
            FORM=self._form.constants(),
            LANES=lanes,
        )
        return out

    def pool_partials(self, pools: PoolMap | PoolTable) -> Partials:
        """Mass and value sum of each pool and of the rest, zero on heads that are not selected."""
        rows, form = self._rows, self._form
        table = DevicePools.of(pools, form.query_heads, self._device)
        if not table.pools or not rows.count:
            mass = torch.ones(rows.count, form.query_heads, 1, device=self._device)
            return Partials(table.pools, mass, mass.new_empty(*mass.shape[:2], 0, form.head_dim))
        known = self.log_sum_exp if table.narrowed else None
        mass, value, _ = self._reduced(table, self._divided(table, known))
        return Partials(table.pools, mass, value)

    def rescale(
        self, output: Tensor, pools: PoolMap, factor: Tensor, computed: Tensor, changes: Changes
    ) -> None:
        """Multiply a pool's probabilities by a factor and renormalise, in place.

        `pool_partials`, `c_0 = f / D`, `c_rest = 1 / D` with `D = 1 + (f - 1) m_0`, and `combine`
        in one. A row that sees none of the pool stays as it is, and so does one whose factor is 1.
        With the stock kernel's log-sum-exps that is one launch, which reads the pool's keys alone.

        Args:
            output: `[tokens, query_heads, head_dim]`, the stock output.
            pools: which keys; one pool per slot.
            factor: float32 `[slots, query_heads]`, `f > 0`.
            computed: bool `[slots]`, where `output` holds nothing yet: attention is computed for
                all heads, and rescaled on the selected ones. Not with the stock's log-sum-exps.
            changes: what is done is added here; on the device.
        """
        if not self._rows.count:
            return
        table = DevicePools.of(pools, self._form.query_heads, self._device)
        finite = changes.finite.view(torch.uint8)
        done = (changes.count, changes.before, changes.after, finite)
        factor = factor.to(self._device, non_blocking=True)
        if self._stock is not None:
            self._correct(self._stock, output, table, factor, done)
            return
        computed = computed.to(self._device, non_blocking=True).view(torch.uint8)
        # All heads of computed slots, selected ones of the others.
        heads = self._heads | computed[:, None]
        sums, chunk = self._divided(table, None, heads=heads)
        gpu_rescale.finish[(self._rows.count, self._form.query_heads)](
            self._rows.tensors,
            self._heads,
            factor,
            computed,
            self._model,
            sums,
            strided(output),
            done,
            chunk,
            self._rows.count,
            FORM=self._form.constants(),
            SINKS=self._form.sinks,
        )

    def _correct(
        self,
        stock: Tensor,
        output: Tensor,
        table: DevicePools,
        factor: Tensor,
        done: tuple[Tensor, ...],
    ) -> None:
        lanes, parts = self._launch.lanes(1)
        query, cache, rows, heads, model = self._given(self._heads)
        gpu_rescale.correct[(self._rows.tiles * parts, self._form.kv_heads)](
            query,
            cache,
            rows,
            heads,
            factor,
            model,
            table.tensors[:2],
            (stock, stock.stride(0)),
            strided(output),
            done,
            parts,
            FORM=self._form.constants(FEW_KEYS),
            LANES=lanes,
        )

    def _divided(
        self,
        table: DevicePools,
        known: Tensor | None,
        *,
        heads: Tensor | None = None,
        values: bool = True,
    ) -> Sums:
        """What the programs of each split have summed."""
        rows, form = self._rows, self._form
        columns = table.pools * (1 + table.weighted) + 1
        lanes, parts = self._launch.lanes(columns)
        splits, chunk = self._launch.splits(parts)
        shape = splits, rows.count, form.query_heads, columns
        peak, total = torch.empty(2, *shape, device=self._device)
        sums = peak.new_empty(*shape, form.head_dim) if values else peak
        gpu_partials.divide[(rows.tiles * parts, form.kv_heads, splits)](
            *self._given(self._heads if heads is None else heads),
            table.tensors,
            peak if known is None else known,
            (peak, total, sums),
            chunk,
            parts,
            table.steps,
            rows.count,
            FORM=form.constants(keys_at_once(form, lanes[1], table.pools)),
            LANES=lanes,
            KIND=_kind(table),
            VALUES=int(values),
            num_warps=warps(lanes[1]),
        )
        return (peak, total, sums), chunk

    def _reduced(
        self, table: DevicePools, divided: Sums, *, values: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Masses, values and log-sum-exps of all splits together."""
        rows, form = self._rows, self._form
        sums, chunk = divided
        columns = sums[0].shape[3]
        lse = torch.empty(rows.count, form.query_heads, device=self._device)
        mass = lse.new_empty(*lse.shape, columns)
        value = lse.new_empty(*mass.shape, form.head_dim) if values else mass
        gpu_partials.reduce[(rows.count, form.query_heads)](
            rows.tensors,
            self._heads,
            self._model,
            sums,
            (mass, value, lse),
            chunk,
            rows.count,
            FORM=form.constants(),
            KIND=_kind(table),
            WIDTH=(columns, power_of_2(columns), int(values)),
            SINKS=form.sinks,
        )
        return mass, value, lse

    def _given(self, heads: Tensor) -> tuple[Any, ...]:
        return strided(self._query), self._cache, self._rows.tensors, heads, self._model


def _kind(table: DevicePools) -> tuple[int, int, int]:
    return table.pools, int(table.weighted), int(table.narrowed)


def combine(
    output: Tensor,
    rows: RowMap,
    heads: Tensor,
    partials: Partials,
    factors: Tensor,
) -> Tensor:
    """Rewrite rows in place, in float32: `O' = sum_g c_g U_g + sum_g d_g W_g + c_rest R`.

    Args:
        output: `[tokens, query_heads, head_dim]`, the stock output.
        rows: which rows, on the host.
        heads: bool `[rows, query_heads]`, which outputs to rewrite.
        partials: what `pool_partials` measured.
        factors: float32 `[rows, query_heads, columns]`, contiguous, columns as of `Partials`;
            without pools the only one is a factor on the stock output.

    Returns:
        bool `[rows]`; False where a result was not finite, and the stock output stays.
    """
    tokens = DeviceRows.of(rows, output.device).tensors[0]
    count, query_heads, columns = factors.shape
    finite = torch.ones(count, dtype=torch.bool, device=output.device)
    if count:
        dim = output.shape[2]
        gpu_combine.combine[(count, query_heads)](
            strided(output),
            tokens,
            heads.view(torch.uint8),
            partials.value if partials.pools else factors,
            factors,
            finite.view(torch.uint8),
            DIM=dim,
            BLOCK_D=power_of_2(dim),
            POOLS=partials.pools,
            COLUMNS=columns,
            BLOCK_C=power_of_2(columns),
        )
    return finite


def warm_up(pages: Tensor, query_heads: int, geometry: AttentionGeometry) -> None:
    """Compile for a layer's cache now: a decoding row of each kernel, without weights.

    Args:
        pages: `[pages, kv_heads, block, 2 * head_dim]`, keys and values of a token side by side.
        query_heads: of this rank.
        geometry: how the layer forms logits.
    """
    dim = pages.shape[3] // 2
    index = torch.zeros(1, dtype=torch.int32)
    table = index.view(1, 1).to(pages.device)
    cache = StridedCache(pages[..., :dim], pages[..., dim:], table)
    rows = RowMap(index.long(), index, index, index, torch.tensor([0, 1], dtype=torch.int32))
    pools = PoolMap(index, torch.tensor([[0, 1]], dtype=torch.int32))
    heads = torch.ones(1, query_heads, dtype=torch.bool, device=pages.device)
    tokens = torch.zeros(1, query_heads, dim, dtype=pages.dtype, device=pages.device)
    attention = Attention(tokens, cache, rows, heads, geometry)
    attention.column_means()
    attention.probabilities(index.numpy())
    partials = attention.pool_partials(pools)
    combine(tokens, rows, heads, partials, partials.mass)
    factor, changes = partials.mass[..., 0].contiguous(), Changes.none(1, query_heads, pages.device)
    attention.rescale(tokens, pools, factor, heads[:, 0].contiguous(), changes)
    known = Attention(tokens, cache, rows, heads, geometry, factor.T.contiguous())
    known.rescale(tokens, pools, factor, heads[:, 0].contiguous(), changes)
