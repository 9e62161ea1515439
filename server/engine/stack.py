"""Tables of the calibrated requests of one method, stacked once for many steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from server.engine.batch import pool_map
from server.engine.requests import Program
from server.kernels.partials import PoolMap

if TYPE_CHECKING:
    from calibrators.interface import IntArray


@dataclass(frozen=True, slots=True)
class Stack:
    """What requests do in each layer; a slot is a request.

    Attributes:
        heads: per layer, bool `[slots, heads]`.
        parameters: by name, per layer, float32 of the same shape.
        pools: per layer.
        active: layers with any selected head.
    """

    heads: Sequence[Tensor]
    parameters: Mapping[str, Sequence[Tensor]]
    pools: Sequence[PoolMap]
    active: frozenset[int]

    @classmethod
    def of(cls, programs: Sequence[Program]) -> Stack:
        """Stack the tables of `programs`, one slot each."""
        heads = np.stack([program.heads for program in programs], axis=1)
        parameters = {
            name: torch.from_numpy(np.stack([p.parameters[name] for p in programs], axis=1))
            for name in programs[0].calibrator.parameters
        }
        return cls(
            torch.from_numpy(heads).unbind(),
            {name: table.unbind() for name, table in parameters.items()},
            _pools(programs),
            frozenset(np.flatnonzero(heads.any((1, 2))).tolist()),
        )


def _pools(programs: Sequence[Program]) -> list[PoolMap]:
    """Pool maps by layer; requests whose pools are the same in all layers are mapped once."""
    depth = len(programs[0].pools)
    layers = [[program.pools[layer] for program in programs] for layer in range(depth)]
    maps: list[PoolMap] = []
    for layer, pools in enumerate(layers):
        same = layer > 0 and _same(pools, layers[layer - 1])
        maps.append(maps[-1] if same else pool_map(pools))
    return maps


def _same(left: Sequence[tuple[IntArray, ...]], right: Sequence[tuple[IntArray, ...]]) -> bool:
    return all(
        np.array_equal(a, b)
        for one, other in zip(left, right, strict=True)
        for a, b in zip(one, other, strict=True)
    )
