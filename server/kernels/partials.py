"""What the kernels take and give, whatever the device.

Keys and values live in pages: key `j` of a request is slot `j % block` of page
`block_table[request, j // block]`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array: TypeAlias = npt.NDArray[Any]

# Prompt rows share the keys they read; more rows per tile than this no longer pay.
TILE = 32
NO_ROWS = torch.zeros(0, dtype=torch.bool)


@dataclass(frozen=True, slots=True)
class PagedCache:
    """Keys and values of one layer.

    Attributes:
        pages: `[pages, kv_heads, 2, head_dim * block]`, contiguous, float32, bfloat16 or float16.
            Index 0 of the third dimension holds keys `[head_dim, block]`, so that one channel
            of successive keys is contiguous; index 1 holds values `[block, head_dim]`.
        block_table: int32 `[requests, pages per request]`.
    """

    pages: Tensor
    block_table: Tensor

    def extent(self, head_dim: int) -> tuple[int, int]:
        """Pages, and tokens of one."""
        return self.pages.shape[0], self.pages.shape[3] // head_dim


@dataclass(frozen=True, slots=True)
class StridedCache:
    """Keys and values of one layer as an accelerator keeps them, in any order of heads and slots.

    Attributes:
        keys: `[pages, kv_heads, block, head_dim]`, float32, bfloat16 or float16; channels side by
            side, the rest apart as far as it likes.
        values: the same, with the same strides.
        block_table: int32 `[requests, pages per request]`; pages side by side.
    """

    keys: Tensor
    values: Tensor
    block_table: Tensor

    def extent(self, head_dim: int) -> tuple[int, int]:  # noqa: ARG002 - as of `PagedCache`
        """Pages, and tokens of one."""
        return self.keys.shape[0], self.keys.shape[2]


@dataclass(frozen=True)
class AttentionGeometry:
    """How the layer forms logits.

    Attributes:
        scale: factor on `q . k`.
        soft_cap: logits become `soft_cap * tanh(logit / soft_cap)`; 0 for none.
        window: a row at `i` sees keys `j > i - window`; 0 for all.
        alibi_slopes: float32 `[query_heads]`, empty for none.
        sinks: float32 `[query_heads]`, a learned logit without a value; empty for none.
    """

    scale: float
    soft_cap: float
    window: int
    alibi_slopes: Tensor
    sinks: Tensor

    @cached_property
    def in_base_2(self) -> tuple[tuple[Any, ...], Array, Array]:
        """`((scale, soft cap, window), slopes, sinks)` for logits whose softmax is of `2^x`."""
        to_base_2 = np.float32(math.log2(math.e))
        numbers = np.float32(self.scale) * to_base_2, np.float32(self.soft_cap) * to_base_2
        slopes, sinks = self.alibi_slopes.numpy(), self.sinks.numpy()
        return (*numbers, self.window), slopes * to_base_2, sinks * to_base_2


@dataclass(frozen=True)
class RowMap:
    """The calibrated rows of a step, in tiles of neighbouring rows of one request.

    Attributes:
        token: int64 `[rows]`, the row of the query and output tensors.
        request: int32 `[rows]`, the row of the block table.
        slot: int32 `[rows]`, the calibrated request among those of the step.
        position: int32 `[rows]`, absolute position, which is also the last visible key.
        tiles: int32 `[tiles + 1]`, where each tile starts; at most `TILE` rows, all of one
            request and at successive positions.
    """

    token: Tensor
    request: Tensor
    slot: Tensor
    position: Tensor
    tiles: Tensor

    @cached_property
    def single(self) -> bool:
        """Whether every tile is one row, as where all generate."""
        return len(self.tiles) == len(self.token) + 1

    @cached_property
    def last(self) -> int:
        """The highest position."""
        return int(self.arrays[3].max())

    def move_on(self, starts: Array) -> None:
        """Become the same rows one token later; a request's tokens start at `starts[request]`."""
        token, request, _, position, _ = self.arrays
        token[:] = starts[request]
        position += 1
        self.__dict__.pop("last", None)

    @cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The fields in order, as views for the CPU."""
        fields = (self.token, self.request, self.slot, self.position, self.tiles)
        return tuple(field.numpy() for field in fields)


@dataclass(frozen=True)
class PoolMap:
    """Pooled keys by slot, as compressed rows.

    Attributes:
        keys: int32 `[entries]`, positions.
        offsets: int32 `[slots, pools + 1]`; pool `g` of slot `s` is
            `keys[offsets[s, g] : offsets[s, g + 1]]`, ascending.
    """

    keys: Tensor
    offsets: Tensor

    @cached_property
    def pools(self) -> int:
        """Number of pools of every slot."""
        return self.offsets.shape[1] - 1

    @cached_property
    def arrays(self) -> tuple[Array, Array]:
        """Keys and offsets, as views for the CPU."""
        return self.keys.numpy(), self.offsets.numpy()


@dataclass(frozen=True)
class PoolTable:
    """Pools that differ between heads or between prompt and generated rows, or are narrowed by row.

    A *set* is one choice of all pools. Key `j` is in pool `g` of set `n` for row `i` where it is
    listed, or within the span, and `p_ij > above[n, g, 0] + above[n, g, 1] / (i + 1)`.

    Attributes:
        listed: keys by set in place of slot.
        spans: int32 `[sets, pools, 2]`, positions `start <= j < stop`; all below the listed keys.
        above: float32 `[sets, pools, 2]`; (-1, 0) for every key.
        sets: int32 `[slots, 2, query_heads]`, the set of prompt rows and of generated rows.
        prompts: int32 `[slots]`, the position of the first generated row.
        weights: float32 `[entries]`, of the listed keys, finite; None where no pool has any.
    """

    listed: PoolMap
    spans: Tensor
    above: Tensor
    sets: Tensor
    prompts: Tensor
    weights: Tensor | None = None

    @classmethod
    def of(cls, pools: PoolMap, query_heads: int) -> PoolTable:
        """The same pools for all heads and rows."""
        sets = torch.arange(len(pools.offsets), dtype=torch.int32)
        above = torch.tensor([-1.0, 0.0]).expand(len(sets), pools.pools, 2).contiguous()
        return cls(
            pools,
            torch.zeros(len(sets), pools.pools, 2, dtype=torch.int32),
            above,
            sets[:, None, None].expand(-1, 2, query_heads).contiguous(),
            torch.zeros_like(sets),
        )

    @classmethod
    @cache
    def none(cls, slots: int, query_heads: int) -> PoolTable:
        """No pools."""
        nothing = torch.zeros(slots, 1, dtype=torch.int32)
        return cls.of(PoolMap(torch.empty(0, dtype=torch.int32), nothing), query_heads)

    @cached_property
    def pools(self) -> int:
        """Number of pools of every set."""
        return self.listed.pools

    @cached_property
    def columns(self) -> int:
        """Number of columns of `Partials`."""
        return self.pools * (1 if self.weights is None else 2) + 1

    @cached_property
    def narrowed(self) -> bool:
        """Whether any pool has a threshold."""
        return bool((self.above[..., 0] >= 0).any())

    @cached_property
    def arrays(self) -> tuple[Array, ...]:
        """Keys, offsets, weights and the other fields in order, as views for the CPU."""
        weights = torch.empty(0) if self.weights is None else self.weights
        fields = (weights, self.spans, self.above, self.sets, self.prompts)
        return *self.listed.arrays, *(field.numpy() for field in fields)


@dataclass(frozen=True, slots=True)
class Partials:
    """Rows divided into pools and the rest, each measured; zero on heads that are not selected.

    There is a column per pool; where any pool has weights, one more per pool behind these; and in
    the end that of the rest. It is measured by itself: where the pools have nearly all of a row,
    the whole less the pools would have no digits left.

    Attributes:
        pools: number of pools.
        mass: float32 `[rows, query_heads, columns]`, `m_g = sum p_j`, in [0, 1]; `sum w_j p_j`,
            zero for a pool without weights; `1 - sum_g m_g`, a learned sink included.
        value: float32 `[rows, query_heads, columns, head_dim]`, `U_g = sum p_j v_j`;
            `W_g = sum w_j p_j v_j`; `R = O - sum_g U_g`. Without pools no columns, since `R` is
            the stock output.
    """

    pools: int
    mass: Tensor
    value: Tensor

    @classmethod
    def empty(cls, pools: PoolMap | PoolTable, rows: int, query_heads: int, dim: int) -> Partials:
        """Room for what is to be measured of `pools`."""
        columns = pools.columns if isinstance(pools, PoolTable) else pools.pools + 1
        mass = torch.ones(rows, query_heads, columns)
        values = columns if pools.pools else 0
        return cls(pools.pools, mass, torch.empty(rows, query_heads, values, dim))

    @classmethod
    def whole(cls, output: Tensor, rows: int) -> Partials:
        """Of rows of `output` `[tokens, query_heads, head_dim]` without pools."""
        _, query_heads, head_dim = output.shape
        value = output.new_empty(rows, query_heads, 0, head_dim, dtype=torch.float32)
        return cls(0, value.new_empty(0), value)


@dataclass(frozen=True)
class Changes:
    """What `rescale` did over the layers of a step, added up.

    Attributes:
        count: int32 `[rows, query_heads]`, outputs rewritten.
        before: float32 of the same shape, the pool's mass.
        after: float32 of the same shape, its mass after rescaling.
        finite: bool `[rows]`; False where a result was not finite and the stock output stays.
    """

    count: Tensor
    before: Tensor
    after: Tensor
    finite: Tensor

    @classmethod
    def none(cls, rows: int, query_heads: int, device: torch.device | str = "cpu") -> Changes:
        """Nothing so far."""
        return cls(
            torch.zeros(rows, query_heads, dtype=torch.int32, device=device),
            torch.zeros(rows, query_heads, device=device),
            torch.zeros(rows, query_heads, device=device),
            torch.ones(rows, dtype=torch.bool, device=device),
        )

    def clear(self) -> None:
        """Nothing so far, in the same place."""
        for field in (self.count, self.before, self.after):
            field.zero_()
        self.finite.fill_(True)

    @cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The fields in order: views on the CPU, else copies that wait for the device."""
        fields = (self.count, self.before, self.after, self.finite)
        return tuple(field.cpu().numpy() for field in fields)
