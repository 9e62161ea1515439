"""What each head makes of the last prompt row where the prompt has no images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calibrators.interface import FloatArray, HeadOutputs
    from server.engine.batch import Member
    from server.engine.taps.tap import View


class TextTap:
    """Outputs of the text pass, which came with the request: handed out with the last row's own.

    The same on all ranks, and again where a prompt comes again.
    """

    local = True
    by_head = False

    def __init__(self, observation: HeadOutputs, length: int, outputs: FloatArray | None) -> None:
        self.observation = observation
        self.layer = observation.layer
        self._last = length - 1
        self._outputs = outputs

    def due(self, start: int, stop: int) -> bool:
        """Where the row is among those of the step."""
        return start <= self._last < stop

    @classmethod
    def take(cls, due: Sequence[tuple[Member, Self]], view: View) -> None:
        """There is nothing to measure."""

    def value(self) -> FloatArray | None:
        """`[query_heads, head_dim]`; None where no text pass was run."""
        return self._outputs
