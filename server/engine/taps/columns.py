"""Column means of a prompt's attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calibrators.interface import ColumnMeans, FloatArray
    from server.engine.batch import Member
    from server.engine.taps.tap import View


class ColumnTap:
    """Means over the rows of a whole prompt, which comes in one step."""

    local = True
    by_head = True

    def __init__(self, observation: ColumnMeans, length: int, own: slice) -> None:
        self.observation = observation
        self.layer = observation.layer
        every = range(own.start, own.stop)
        wanted = every if observation.heads is None else observation.heads
        self._heads = [head - own.start for head in wanted if head in every]
        self._length = length
        self._means: FloatArray | None = None

    def due(self, start: int, stop: int) -> bool:
        """Where the whole prompt is in the step."""
        return start == 0 and stop == self._length

    @classmethod
    def take(cls, due: Sequence[tuple[Member, Self]], view: View) -> None:
        """All columns of all prompts, in a pass of their own over the keys."""
        rows = view.prompts([member for member, _ in due])
        attention = view.attention(rows, [tap._heads for _, tap in due])
        means, begin = attention.column_means().cpu().numpy(), 0
        for _, tap in due:
            tap._means = means[:, begin : begin + tap._length]
            begin += tap._length

    def value(self) -> FloatArray | None:
        """`[query_heads, P]`."""
        means, self._means = self._means, None
        return means
