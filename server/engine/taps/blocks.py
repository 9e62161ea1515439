"""A block of a prompt's attention probabilities, gathered over the steps it comes in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import numpy as np

from server.engine.batch import rows_at

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calibrators.interface import FloatArray, ProbabilityBlock
    from server.engine.batch import Member
    from server.engine.taps.tap import View

# Probabilities on an accelerator at a time, 64 MiB: how many a prompt has is known when it comes,
# and memory is shared out before.
AT_ONCE = 1 << 24


class BlockTap:
    """Probabilities of some rows and keys.

    Rows are computed in order, from the first: their prompt reads no cached KV. A prompt that comes
    again is measured again.
    """

    local = False
    by_head = True

    def __init__(self, observation: ProbabilityBlock, query_heads: int) -> None:
        self.observation = observation
        self.layer = observation.layer
        self._rows = np.array(observation.rows, np.int32)
        spans = [np.arange(span.start, span.stop, dtype=np.int32) for span in observation.keys]
        self._keys = np.concatenate(spans) if spans else np.empty(0, np.int32)
        self._shape = query_heads, len(self._rows), len(self._keys)
        self._at_once = max(1, AT_ONCE // max(query_heads * len(self._keys), 1))
        self._block: FloatArray | None = None
        self._taken = 0

    def due(self, start: int, stop: int) -> bool:
        """Where some of the rows are."""
        first, last = np.searchsorted(self._rows, (start, stop))
        return bool(first < last)

    @classmethod
    def take(cls, due: Sequence[tuple[Member, Self]], view: View) -> None:
        """Add the rows of a step to those before."""
        for member, tap in due:
            tap._add(member, view)

    def _add(self, member: Member, view: View) -> None:
        first, last = np.searchsorted(self._rows, (member.start, member.stop))
        if first == 0:
            self._block, self._taken = np.empty(self._shape, np.float32), 0
        if self._block is None or first > self._taken:
            return
        for start in range(first, last, self._at_once):
            part = slice(start, min(start + self._at_once, last))
            attention = view.attention(rows_at(member, self._rows[part]))
            self._block[:, part] = attention.probabilities(self._keys).cpu().numpy()
        self._taken = int(last)

    def value(self) -> FloatArray | None:
        """`[query_heads, rows, keys]`; not kept."""
        if not len(self._rows):
            return np.empty(self._shape, np.float32)
        block, self._block = self._block, None
        return block if self._taken == len(self._rows) else None
