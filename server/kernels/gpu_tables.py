"""Tables of a step as Triton kernels read them, on the device.

Rows and pools are made on the host; what a launch has to know of them is read there, so that no
kernel waits for the device. Copies are kept with the table they are of: all layers of a step share
those of its rows, and many steps those of its pools.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from server.kernels.partials import AttentionGeometry, PoolMap, PoolTable, RowMap

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class DeviceRows:
    """A `RowMap` on the device.

    Attributes:
        tensors: `(token, request, slot, position, tiles)`.
        ends: int32 `[tiles]`, one past the last row of the slot that a tile belongs to.
        count: rows.
        tiles: number of tiles.
        longest: rows of the longest tile.
        reach: one past the last position.
    """

    tensors: tuple[Tensor, ...]
    ends: Tensor
    count: int
    tiles: int
    longest: int
    reach: int

    @classmethod
    def of(cls, rows: RowMap, device: torch.device) -> DeviceRows:
        """The copy of `rows` on `device`."""
        return kept(rows, device, lambda: cls._made(rows, device))

    @classmethod
    def _made(cls, rows: RowMap, device: torch.device) -> DeviceRows:
        _, _, slot, position, tiles = rows.arrays
        fields = (rows.token, rows.request, rows.slot, rows.position, rows.tiles)
        # Rows of a slot lie side by side.
        last = np.r_[np.flatnonzero(np.diff(slot)) + 1, len(slot)]
        ends = last[np.searchsorted(last, tiles[:-1], side="right")].astype(np.int32)
        return cls(
            tuple(field.to(device, non_blocking=True) for field in fields),
            torch.from_numpy(ends).to(device, non_blocking=True),
            len(slot),
            len(tiles) - 1,
            int(np.diff(tiles).max(initial=0)),
            int(position.max(initial=-1)) + 1,
        )


@dataclass(frozen=True, slots=True)
class DevicePools:
    """A `PoolTable` on the device.

    Attributes:
        tensors: `(keys, offsets, weights, spans, above, sets, prompts)`, none of them empty.
        pools: number of pools.
        weighted: whether any has weights.
        narrowed: whether any has a threshold.
        steps: halvings that find a key in the longest list.
    """

    tensors: tuple[Tensor, ...]
    pools: int
    weighted: bool
    narrowed: bool
    steps: int

    @classmethod
    def of(cls, pools: PoolMap | PoolTable, query_heads: int, device: torch.device) -> DevicePools:
        """The copy of `pools` on `device`."""
        return kept(pools, device, lambda: cls._made(pools, query_heads, device))

    @classmethod
    def _made(
        cls, pools: PoolMap | PoolTable, query_heads: int, device: torch.device
    ) -> DevicePools:
        table = PoolTable.of(pools, query_heads) if isinstance(pools, PoolMap) else pools
        keys, offsets, weights, *others = (torch.from_numpy(array) for array in table.arrays)
        longest = int(offsets.diff(dim=1).max()) if table.pools and len(offsets) else 0
        fields = (_filled(keys), offsets, _filled(weights), *map(_filled, others))
        return cls(
            tuple(field.to(device, non_blocking=True) for field in fields),
            table.pools,
            table.weights is not None,
            table.narrowed,
            longest.bit_length(),
        )


def _filled(tensor: Tensor) -> Tensor:
    """Something to point at; of a table without entries nothing is read."""
    return tensor if tensor.numel() else tensor.new_zeros(1)


def kept(
    table: RowMap | PoolMap | PoolTable | AttentionGeometry,
    device: torch.device,
    make: Callable[[], T],
) -> T:
    """What `make` gives for a table and a device, made once and kept with the table."""
    copies = vars(table).setdefault("_on_device", {})
    if device not in copies:
        copies[device] = make()
    found: T = copies[device]
    return found
