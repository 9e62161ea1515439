"""One step's batch as the attention metadata describes it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from calibrators.interface import Rows
from server.kernels.partials import TILE, RowMap

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calibrators.interface import IntArray
    from server.engine.programs import Program
    from server.engine.requests import CalibratedRequest, RequestTable

EVERY = Rows()


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


def row_map(batch: Sequence[Member], programs: Sequence[Program] | None = None) -> RowMap:
    """The calibrated rows of one method; `programs[s]` belongs to `batch[s]`, its slot.

    Without programs, all rows.
    """
    table = np.array([(m.row, m.token, m.start, m.stop - m.start) for m in batch], np.int64)
    # Contiguous, since kernels would be compiled anew for anything else.
    request, token, start, lengths = np.ascontiguousarray(table.T)
    slot, position = np.arange(len(batch)), start
    if (lengths > 1).any():  # generated tokens alone, a row each, are the usual case
        slot = np.repeat(slot, lengths)
        index = np.arange(len(slot)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        position, token = index + start[slot], index + token[slot]
    keep = None if programs is None else _calibrated(batch, programs, slot, position)
    if keep is not None:
        slot, position, token = slot[keep], position[keep], token[keep]
    return _mapped(token, request[slot], slot, position)


def prompt_rows(batch: Sequence[Member]) -> RowMap:
    """The rows of prompts."""
    return row_map([replace(m, stop=min(m.stop, m.request.prompt.length)) for m in batch])


def rows_at(member: Member, positions: IntArray) -> RowMap:
    """The rows of one request, slot 0, at positions `start <= i < stop` in ascending order."""
    position = positions.astype(np.int64)
    nothing = np.zeros_like(position)
    return _mapped(position - member.start + member.token, nothing + member.row, nothing, position)


def _mapped(
    token: npt.NDArray[np.int64],
    request: npt.NDArray[np.int64],
    slot: npt.NDArray[np.int64],
    position: npt.NDArray[np.int64],
) -> RowMap:
    return RowMap(
        token=torch.from_numpy(token),
        request=torch.from_numpy(request.astype(np.int32)),
        slot=torch.from_numpy(slot.astype(np.int32)),
        position=torch.from_numpy(position.astype(np.int32)),
        tiles=torch.from_numpy(_tiles(slot, position)),
    )


def _calibrated(
    batch: Sequence[Member],
    programs: Sequence[Program],
    slot: npt.NDArray[np.int64],
    position: npt.NDArray[np.int64],
) -> npt.NDArray[np.bool_] | None:
    """Which rows are; None where all are."""
    if all(program.rows == EVERY for program in programs):
        return None
    first = np.array([program.rows.first for program in programs])
    generated = np.array([program.rows.generated for program in programs])
    lengths = np.array([member.request.prompt.length for member in batch])
    keep = (position >= first[slot]) & (generated[slot] | (position < lengths[slot]))
    for s, program in enumerate(programs):
        for span in program.rows.skip:
            keep &= (slot != s) | (position < span.start) | (position >= span.stop)
    return keep


def _tiles(slot: npt.NDArray[np.int64], position: npt.NDArray[np.int64]) -> IntArray:
    """Where tiles of at most `TILE` successive positions of a slot start, and the last ends."""
    count = len(slot)
    if (np.diff(slot) != 0).all():
        return np.arange(count + 1, dtype=np.int32)
    breaks = np.ones(count, np.bool_)
    breaks[1:] = (np.diff(position) != 1) | (np.diff(slot) != 0)
    starts = np.flatnonzero(breaks)
    index = np.arange(count)
    within = index - np.repeat(starts, np.diff(starts, append=count))
    return np.append(index[within % TILE == 0], count).astype(np.int32)
