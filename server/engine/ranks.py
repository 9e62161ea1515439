"""What the tensor-parallel ranks did in a step, brought together.

Each rank calibrates its own heads of the same rows, and only one rank's output reaches the
scheduler. The others hand it their shares once per step with calibrated requests. The scheduler's
output, which all ranks see, decides whether there is such a step; so all take part or none.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from vllm.distributed.parallel_state import GroupCoordinator

OUTPUT_RANK = 0


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank did for one method in a step.

    Attributes:
        done: bool `[rows]`, calibrated in at least one layer and head, and not counted before.
        finite: bool `[rows]`, False where a result was not finite.
        count: float64 `[requests]`, (layer, head, row) that statistics are over.
        sums: float64 `[requests]` per statistic; a rank without a calibrated head has none.
    """

    done: npt.NDArray[np.bool_]
    finite: npt.NDArray[np.bool_]
    count: npt.NDArray[np.float64]
    sums: Mapping[str, npt.NDArray[np.float64]]


Shares: TypeAlias = Mapping[str, Share]
"""By name of the method."""

Union: TypeAlias = Callable[[Shares], Shares]
"""Turns a rank's shares into those of all ranks, on the rank whose output is used."""

Gather: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""Puts the heads of all ranks side by side, on all ranks: float32 `[rows, heads of a rank, n]`.

Every rank calls it, in the same order and with the same shape, or the others wait for ever: what
decides whether it is called has to be the same on all of them, whatever fails on one.
"""


def alone(shares: Shares) -> Shares:
    """The union where one rank has all heads."""
    return shares


def across(group: GroupCoordinator) -> Union:
    """The union over the ranks of a tensor-parallel group."""
    if group.world_size == 1:
        return alone

    def gathered(shares: Shares) -> Shares:
        messages = _gather(group, pickle.dumps(shares))
        return shares if messages is None else united([pickle.loads(m) for m in messages])

    return gathered


def heads_across(group: GroupCoordinator) -> Gather | None:
    """The gather over the ranks of a tensor-parallel group; None where one rank has all heads."""
    if group.world_size == 1:
        return None

    def gathered(values: torch.Tensor) -> torch.Tensor:
        rows, heads, n = values.shape
        if not values.numel():
            return values.new_empty(rows, heads * group.world_size, n)
        return _all_gather(group, values.contiguous(), 1)

    return gathered


def _all_gather(group: GroupCoordinator, values: torch.Tensor, dim: int) -> torch.Tensor:
    """Values of all ranks side by side, wherever they lie.

    vLLM's collectives are of the device of the layers. On GPUs, what is on the host goes by the
    group that vLLM has for it.
    """
    if values.device.type == group.device.type:
        every: torch.Tensor = group.all_gather(values, dim)
        return every
    parts = [torch.empty_like(values) for _ in range(group.world_size)]
    torch.distributed.all_gather(parts, values, group=group.cpu_group)
    return torch.cat(parts, dim)


def _gather(group: GroupCoordinator, message: bytes) -> list[bytes] | None:
    """The messages of all ranks, padded at their ends; None on all ranks but the output rank.

    Where layers are on the host by vLLM's collectives, which take floats, all ranks as many, and go
    through shared memory: 0.1 ms, where torch.distributed.gather_object takes 1 to 2 ms.
    """
    lengths = _all_gather(group, torch.tensor([float(len(message))]), 0)
    words = -(-int(lengths.max()) // 4)
    padded = bytearray(message.ljust(4 * words, b"\0"))
    own = torch.frombuffer(padded, dtype=torch.float32)
    if group.device.type == own.device.type:
        received = group.gather(own, OUTPUT_RANK, 0)
    else:
        everywhere = _all_gather(group, own, 0)
        received = everywhere if group.rank_in_group == OUTPUT_RANK else None
    if received is None:
        return None
    return [row.tobytes() for row in received.view(-1, words).numpy()]


def united(parts: Sequence[Shares]) -> Shares:
    """Shares of all ranks as one; the first part is the output rank's own."""
    return {
        name: _united([part.get(name) for part in parts], own) for name, own in parts[0].items()
    }


def _united(shares: Sequence[Share | None], own: Share) -> Share:
    known = [share for share in shares if share is not None and _alike(share, own)]
    if len(known) < len(shares):
        # A calibrator raised on some ranks only. Which rows were left out there is not known,
        # so none of them passes for calibrated.
        return replace(own, finite=np.zeros_like(own.finite))
    nothing = np.zeros_like(own.count)
    names = {name for share in known for name in share.sums}
    return Share(
        done=np.any([share.done for share in known], axis=0),
        finite=np.all([share.finite for share in known], axis=0),
        count=np.sum([share.count for share in known], axis=0),
        sums={
            name: np.sum([share.sums.get(name, nothing) for share in known], axis=0)
            for name in names
        },
    )


def _alike(share: Share, other: Share) -> bool:
    return share.done.shape == other.done.shape and share.count.shape == other.count.shape
