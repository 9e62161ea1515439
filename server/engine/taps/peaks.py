"""Peaks of the residual stream, kept beside the KV blocks of the tokens they belong to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from calibrators.interface import FloatArray, ResidualPeaks
    from server.engine.batch import Member
    from server.engine.taps.tap import View

EPSILON = 1e-6


class PeakTable:
    """Peaks of cached tokens, by the slot of the KV cache that holds their keys and values.

    They are written with a block and are good for as long as the block is: whoever finds it in the
    prefix cache has equal settings, and asked for the same peaks in the same order. The memory of a
    row, four bytes per slot, is taken as slots are written.
    """

    def __init__(self) -> None:
        self._rows: dict[tuple[str, int], FloatArray] = {}

    def row(self, key: tuple[str, int], slots: int) -> FloatArray:
        """Peaks of all slots; `key` is a calibrator's name and how manieth of its peaks it is."""
        row = self._rows.get(key)
        if row is None or len(row) != slots:
            row = self._rows[key] = np.zeros(slots, np.float32)
        return row


class PeakTap:
    """Peaks of the prompt in one layer, as far as it is computed."""

    local = True
    by_head = False

    def __init__(
        self, observation: ResidualPeaks, length: int, table: PeakTable, key: tuple[str, int]
    ) -> None:
        self.observation = observation
        self.layer = observation.layer
        self._length = length
        self._channels = torch.tensor(observation.channels)
        self._table, self._key = table, key
        self._entered: FloatArray | None = None
        self._known: tuple[FloatArray, npt.NDArray[np.int64]] | None = None

    def due(self, start: int, stop: int) -> bool:
        """In every piece of the prompt."""
        return start < stop

    def enter(self, member: Member, hidden: Tensor, residual: Tensor | None) -> None:
        """Measure rows on their way into the layer; the stream is the sum of both."""
        rows = slice(member.token, member.token + min(member.stop, self._length) - member.start)
        stream = hidden[rows].float()
        if residual is not None:
            stream = stream + residual[rows].float()
        self._entered = peaks(stream, self._channels.to(stream.device)).cpu().numpy()

    @classmethod
    def take(cls, due: Sequence[tuple[Member, Self]], view: View) -> None:
        """Put them beside their keys and values, where others may find them in this very step."""
        for member, tap in due:
            tap._put(member, view)

    def _put(self, member: Member, view: View) -> None:
        if self._entered is None:
            return
        pages, block = view.cache.extent(view.query.shape[2])
        stop = member.start + len(self._entered)
        index = np.arange(stop)
        blocks = view.cache.block_table[member.row].cpu().numpy()
        slots = blocks[index // block].astype(np.int64) * block + index % block
        row = self._table.row(self._key, pages * block)
        row[slots[member.start :]] = self._entered
        window = view.geometry.window
        hidden = max(member.start - window + 1, 0) if window else 0
        self._known, self._entered = (row, np.where(index < hidden, -1, slots)), None

    def value(self) -> FloatArray | None:
        """`[P]`; read when all requests of the step have put theirs down."""
        if self._known is None:
            return None
        (row, slots), self._known = self._known, None
        known = np.zeros(self._length, np.float32)
        known[: len(slots)] = np.where(slots < 0, 0, row[slots])
        return known


def peaks(stream: Tensor, channels: Tensor) -> Tensor:
    """`max_{d in channels} |x_d| / sqrt(mean_k x_k^2 + 1e-6)`; `[rows]`.

    Args:
        stream: float32 `[rows, hidden_size]`.
        channels: int64 `[n]`, at least one.
    """
    size = stream.pow(2).mean(-1).add(EPSILON).sqrt()
    return stream[:, channels].abs().amax(-1) / size
