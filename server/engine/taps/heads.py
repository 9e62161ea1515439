"""What each head makes of the last prompt row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calibrators.interface import FloatArray, HeadOutputs
    from server.engine.batch import Member
    from server.engine.taps.tap import View


class HeadTap:
    """Outputs of the last prompt row, in the step it is in."""

    local = True
    by_head = True

    def __init__(self, observation: HeadOutputs, length: int) -> None:
        self.observation = observation
        self.layer = observation.layer
        self._last = length - 1
        self._outputs: FloatArray | None = None

    def due(self, start: int, stop: int) -> bool:
        """Where the row is among those of the step."""
        return start <= self._last < stop

    @classmethod
    def take(cls, due: Sequence[tuple[Member, Self]], view: View) -> None:
        """Copy the rows: their heads may be scaled next."""
        rows = [member.token + tap._last - member.start for member, tap in due]
        outputs = view.output[rows].float().cpu().numpy()
        for (_, tap), own in zip(due, outputs, strict=True):
            tap._outputs = own

    def value(self) -> FloatArray | None:
        """`[query_heads, head_dim]`."""
        outputs, self._outputs = self._outputs, None
        return outputs
