"""Pools of a layer: from what a method names to the tables that the kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from calibrators.interface import LayerPlan, Pool, Span, Threshold
from server.kernels.partials import PoolMap, PoolTable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from calibrators.interface import FloatArray, IntArray

NO_KEYS = np.empty(0, np.int32)
_END = int(np.iinfo(np.int32).max)


@dataclass(frozen=True, slots=True)
class LayerPools:
    """The pools of one request in one layer, checked.

    Attributes:
        prompt: of prompt rows; keys and weights per head are those of this rank.
        generated: of generated rows.
        plain: lists of keys without weights, the same for all heads and rows.
    """

    prompt: tuple[Pool, ...]
    generated: tuple[Pool, ...]
    plain: bool

    @classmethod
    def none(cls, pools: int) -> LayerPools:
        """Empty pools."""
        empty = (Pool(NO_KEYS),) * pools
        return cls(empty, empty, True)

    @classmethod
    def of(cls, plan: LayerPlan, pools: int, query_heads: int, own: slice) -> LayerPools:
        """The pools of a plan, for the `own` heads of this rank.

        Raises:
            ValueError: the kernels, which check nothing, could not read them.
        """
        prompt = tuple(_checked(pool, query_heads, own) for pool in plan.pools)
        generated = prompt
        if plan.generated_pools is not None:
            generated = tuple(_checked(pool, query_heads, own) for pool in plan.generated_pools)
        if len(prompt) != pools or len(generated) != pools:
            raise ValueError(f"a plan has {len(prompt)} and {len(generated)} pools, not {pools}")
        listed = all(isinstance(pool.keys, np.ndarray) and pool.above is None for pool in prompt)
        plain = listed and generated is prompt and not any(_weighted(prompt))
        return cls(prompt, generated, plain)

    @property
    def weighted(self) -> bool:
        """Whether any pool has weights."""
        return any(_weighted((*self.prompt, *self.generated)))


def _weighted(pools: Iterable[Pool]) -> Iterable[bool]:
    return (pool.weights is not None for pool in pools)


def _checked(pool: Pool, query_heads: int, own: slice) -> Pool:
    keys: IntArray | list[IntArray] | Span
    if isinstance(pool.keys, Span):
        keys = _within(pool.keys)
    elif isinstance(pool.keys, np.ndarray):
        keys = _ascending(pool.keys)
    elif len(pool.keys) != query_heads:
        raise ValueError(f"a pool has keys for {len(pool.keys)} heads, not {query_heads}")
    else:
        keys = [_ascending(each) for each in pool.keys[own]]
    if pool.weights is None:
        return Pool(keys, above=pool.above)
    return Pool(keys, _fitting(pool.weights, keys, query_heads, own), pool.above)


def _within(span: Span) -> Span:
    if not 0 <= span.start <= span.stop:
        raise ValueError(f"a pool reaches from {span.start} to {span.stop}")
    return Span(min(span.start, _END), min(span.stop, _END))


def _ascending(keys: IntArray) -> IntArray:
    if keys.shape == (0,):
        return NO_KEYS
    if keys.ndim != 1 or (len(keys) and (keys[0] < 0 or (np.diff(keys) <= 0).any())):
        raise ValueError("keys of a pool are not distinct positions in ascending order")
    return keys.astype(np.int32)


def _fitting(
    weights: FloatArray | Sequence[FloatArray],
    keys: IntArray | Sequence[IntArray] | Span,
    query_heads: int,
    own: slice,
) -> FloatArray | list[FloatArray]:
    """Weights that fit the checked keys, for all heads or for each."""
    if isinstance(keys, Span):
        raise ValueError("a span carries weights, which belong to listed keys")
    if isinstance(weights, np.ndarray):
        if not isinstance(keys, np.ndarray):
            raise ValueError("keys of each head have the same weights for all")
        return _finite(weights, keys)
    if len(weights) != query_heads:
        raise ValueError(f"a pool has weights for {len(weights)} heads, not {query_heads}")
    listed = weights[own]
    by_head = [keys] * len(listed) if isinstance(keys, np.ndarray) else keys
    return [_finite(each, of) for each, of in zip(listed, by_head, strict=True)]


def _finite(weights: FloatArray, keys: IntArray) -> FloatArray:
    with np.errstate(over="ignore"):
        rounded = weights.astype(np.float32)
    if rounded.shape != keys.shape or not np.isfinite(rounded).all():
        raise ValueError("weights of a pool are not one finite number per key")
    return rounded


def stacked(pools: Sequence[LayerPools], prompts: Sequence[int], heads: int) -> PoolMap | PoolTable:
    """The pools of each slot in one layer; `prompts` are lengths."""
    if all(slot.plain for slot in pools):
        return pool_map([[_keys(pool, 0) for pool in slot.prompt] for slot in pools])
    chosen: list[list[int]] = []
    sets: list[tuple[tuple[Pool, ...], int]] = []
    for slot in pools:
        first = _add_sets(sets, slot.prompt, heads)
        same = slot.generated is slot.prompt
        chosen += [first, first if same else _add_sets(sets, slot.generated, heads)]
    return PoolTable(
        pool_map([[_keys(pool, head) for pool in half] for half, head in sets]),
        torch.tensor([[_span(pool) for pool in half] for half, _ in sets], dtype=torch.int32),
        torch.tensor([[_above(pool.above) for pool in half] for half, _ in sets]),
        torch.tensor(chosen, dtype=torch.int32).view(len(pools), 2, heads),
        torch.tensor(prompts, dtype=torch.int32),
        _all_weights(sets) if any(slot.weighted for slot in pools) else None,
    )


def _add_sets(
    sets: list[tuple[tuple[Pool, ...], int]], half: tuple[Pool, ...], heads: int
) -> list[int]:
    """Add what the heads of a slot choose from; which is whose."""
    first, by_head = len(sets), any(_by_head(pool) for pool in half)
    sets += [(half, head) for head in range(heads if by_head else 1)]
    return [first + head * by_head for head in range(heads)]


def _by_head(pool: Pool) -> bool:
    same = isinstance(pool.keys, (np.ndarray, Span))
    return not (same and (pool.weights is None or isinstance(pool.weights, np.ndarray)))


def _keys(pool: Pool, head: int) -> IntArray:
    if isinstance(pool.keys, Span):
        return NO_KEYS
    return pool.keys if isinstance(pool.keys, np.ndarray) else pool.keys[head]


def _all_weights(sets: Sequence[tuple[tuple[Pool, ...], int]]) -> torch.Tensor:
    """Weights in the order in which `pool_map` lays out the keys; 0 where a pool has none."""
    return torch.from_numpy(
        np.concatenate([_weights(pool, head) for half, head in sets for pool in half])
    )


def _weights(pool: Pool, head: int) -> FloatArray:
    if pool.weights is None:
        return np.zeros(len(_keys(pool, head)), np.float32)
    return pool.weights if isinstance(pool.weights, np.ndarray) else pool.weights[head]


def _span(pool: Pool) -> tuple[int, int]:
    return (pool.keys.start, pool.keys.stop) if isinstance(pool.keys, Span) else (0, 0)


def _above(threshold: Threshold | None) -> tuple[float, float]:
    """Absolute and relative part of a bound."""
    if threshold is None:
        return -1.0, 0.0
    return (0.0, threshold.bound) if threshold.relative else (threshold.bound, 0.0)


def pool_map(pools: Sequence[Sequence[IntArray]]) -> PoolMap:
    """Compressed rows of the pools of each slot, for one layer."""
    lengths = [[0, *(len(pool) for pool in slot)] for slot in pools]
    flat = [pool for slot in pools for pool in slot]
    keys = np.concatenate(flat) if flat else NO_KEYS
    ends = np.cumsum(np.array(lengths, np.int32), axis=1, dtype=np.int32)
    starts = np.cumsum(np.r_[np.int32(0), ends[:-1, -1]], dtype=np.int32)
    return PoolMap(torch.from_numpy(keys), torch.from_numpy(ends + starts[:, None]))
