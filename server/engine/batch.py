"""One step's batch as the attention metadata describes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from server.engine.requests import CalibratedRequest, Program, RequestTable, positions
from server.kernels.partials import TILE, PoolMap, RowMap

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calibrators.interface import IntArray


@dataclass(frozen=True, slots=True)
class Member:
    """A calibrated request in the batch.

    Attributes:
        request: its state.
        row: its row of the block table.
        token: its first row of the query tensor.
        start: position of that row.
        stop: position after its last row.
    """

    request: CalibratedRequest
    row: int
    token: int
    start: int
    stop: int


def members(
    table: RequestTable,
    request_ids: Sequence[str],
    query_start: Sequence[int],
    seq_lens: Sequence[int],
) -> list[Member]:
    """The calibrated requests of a batch, in its order.

    Args:
        table: state by request id.
        request_ids: ids by row of the batch.
        query_start: `[rows + 1]`, where each request's tokens start in the query tensor.
        seq_lens: `[rows]`, tokens of each request after this step.
    """
    found = []
    for row, request_id in enumerate(request_ids):
        request = table.get(request_id)
        if request is not None:
            token, stop = query_start[row], seq_lens[row]
            start = stop - (query_start[row + 1] - token)
            found.append(Member(request, row, token, start, stop))
    return found


def row_map(batch: Sequence[Member], programs: Sequence[Program]) -> RowMap:
    """The calibrated rows of one method; `programs[s]` belongs to `batch[s]`, its slot."""
    token: list[IntArray] = []
    position: list[IntArray] = []
    edges = [0]
    for member, program in zip(batch, programs, strict=True):
        length = member.request.prompt.length
        chosen = positions(program.rows, member.start, member.stop, length)
        position.append(chosen)
        token.append(chosen - np.int32(member.start - member.token))
        edges += _tile_ends(chosen, edges[-1])
    lengths = [len(chosen) for chosen in position]
    return RowMap(
        token=torch.from_numpy(np.concatenate(token).astype(np.int64)),
        request=_repeat([member.row for member in batch], lengths),
        slot=_repeat(range(len(batch)), lengths),
        position=torch.from_numpy(np.concatenate(position)),
        tiles=torch.tensor(edges, dtype=torch.int32),
    )


def _repeat(values: Sequence[int], lengths: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.repeat(np.array(values, np.int32), lengths))


def _tile_ends(chosen: IntArray, offset: int) -> list[int]:
    """Ends of tiles of at most `TILE` successive positions, shifted by `offset`."""
    ends, begin = [], 0
    breaks = np.flatnonzero(np.diff(chosen) != 1) + 1
    for run_end in [*breaks.tolist(), len(chosen)]:
        ends += [offset + end for end in range(begin + TILE, run_end, TILE)]
        if run_end > begin:
            ends.append(offset + run_end)
        begin = run_end
    return ends


def pool_map(pools: Sequence[tuple[IntArray, ...]]) -> PoolMap:
    """Compressed rows of the pools of each slot, for one layer."""
    lengths = [[0, *(len(pool) for pool in slot)] for slot in pools]
    flat = [pool for slot in pools for pool in slot]
    keys = np.concatenate(flat) if flat else np.empty(0, np.int32)
    ends = np.cumsum(np.array(lengths, np.int32), axis=1, dtype=np.int32)
    starts = np.cumsum(np.r_[np.int32(0), ends[:-1, -1]], dtype=np.int32)
    return PoolMap(torch.from_numpy(keys), torch.from_numpy(ends + starts[:, None]))
