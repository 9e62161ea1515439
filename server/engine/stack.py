"""Tables of the calibrated requests of one method, stacked once for many steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from calibrators.interface import Pool
from server.engine.pools import LayerPools, stacked
from server.engine.programs import Program
from server.kernels.partials import PoolMap, PoolTable

HOST = torch.device("cpu")


@dataclass(slots=True)
class Stack:
    """What requests do in each layer; a slot is a request.

    Attributes:
        programs: one per slot.
        heads: per layer, bool `[slots, heads of this rank]`.
        parameters: by name, per layer, float32 `[slots, heads]`; all heads of the model for a
            method that looks across them.
        pools: per layer.
        maps: the same where all are plain and none will change; else None.
        active: layers in which any program is active.
        device: of heads and parameters; kernels move pools there themselves, once.
    """

    programs: Sequence[Program]
    heads: list[Tensor]
    parameters: Mapping[str, list[Tensor]]
    pools: list[PoolMap | PoolTable]
    maps: Sequence[PoolMap] | None
    active: set[int]
    device: torch.device
    _changed: list[frozenset[int]] | None = None

    @classmethod
    def of(cls, programs: Sequence[Program], device: torch.device = HOST) -> Stack:
        """Stack the tables of `programs`, one slot each."""
        heads = np.stack([program.heads for program in programs], axis=1)
        parameters = {
            name: torch.from_numpy(np.stack([p.parameters[name] for p in programs], axis=1)).to(
                device, non_blocking=True
            )
            for name in programs[0].calibrator.parameters
        }
        pools = _pools(programs)
        maps = [pool for pool in pools if isinstance(pool, PoolMap)]
        settled = len(maps) == len(pools) and not any(program.observed for program in programs)
        return cls(
            programs,
            list(torch.from_numpy(heads).to(device, non_blocking=True).unbind()),
            {name: list(table.unbind()) for name, table in parameters.items()},
            pools,
            maps if settled else None,
            set(np.flatnonzero(np.any([program.active for program in programs], 0)).tolist()),
            device,
        )

    def changed_by(self, factors: Sequence[Tensor]) -> list[frozenset[int]]:
        """Per layer, the slots with a selected head whose factor is not 1."""
        if self._changed is None:
            pairs = zip(self.heads, factors, strict=True)
            tables = [(heads & (factor != 1)).any(1) for heads, factor in pairs]
            self._changed = [frozenset(table.nonzero()[:, 0].tolist()) for table in tables]
        return self._changed

    def renew(self, layer: int) -> None:
        """Stack a layer again, after a program was resolved in it or given up.

        That happens in a step that the program takes part in, and so to the stack in use.
        """
        heads = np.stack([program.heads[layer] for program in self.programs])
        self.heads[layer] = torch.from_numpy(heads).to(self.device, non_blocking=True)
        for name, tables in self.parameters.items():
            rows = [program.parameters[name][layer] for program in self.programs]
            tables[layer] = torch.from_numpy(np.stack(rows)).to(self.device, non_blocking=True)
        self.pools[layer] = _stacked(self.programs, layer)
        self.active.discard(layer)
        if any(program.active[layer] for program in self.programs):
            self.active.add(layer)


def _pools(programs: Sequence[Program]) -> list[PoolMap | PoolTable]:
    """Pools by layer; requests whose pools are the same in all layers are mapped once."""
    depth = len(programs[0].pools)
    layers = [[program.pools[layer] for program in programs] for layer in range(depth)]
    maps: list[PoolMap | PoolTable] = []
    for layer, pools in enumerate(layers):
        same = layer > 0 and _same(pools, layers[layer - 1])
        maps.append(maps[-1] if same else _stacked(programs, layer))
    return maps


def _stacked(programs: Sequence[Program], layer: int) -> PoolMap | PoolTable:
    pools = [program.pools[layer] for program in programs]
    prompts = [program.prompt.length for program in programs]
    return stacked(pools, prompts, programs[0].heads.shape[1])


def _same(left: Sequence[LayerPools], right: Sequence[LayerPools]) -> bool:
    return all(
        one is other or (one.plain and other.plain and all(map(_equal, one.prompt, other.prompt)))
        for one, other in zip(left, right, strict=True)
    )


def _equal(one: Pool, other: Pool) -> bool:
    """Whether two lists of keys are the same."""
    return np.array_equal(one.keys, other.keys)  # type: ignore[arg-type]
