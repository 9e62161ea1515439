"""What each head makes of the last prompt row."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

    def take(self, member: Member, view: View) -> None:
        """Copy the row: its heads may be scaled next."""
        row = view.output[member.token + self._last - member.start]
        self._outputs = row.float().cpu().clone().numpy()

    def value(self) -> FloatArray | None:
        """`[query_heads, head_dim]`."""
        outputs, self._outputs = self._outputs, None
        return outputs
