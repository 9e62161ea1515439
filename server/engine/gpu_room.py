"""What calibration takes of a GPU's memory in the largest step, counted before vLLM profiles.

Nothing is kept there from step to step but tables of the requests. What a layer measures is given
back before the next one; what was done to its rows is kept until the step ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server.engine.taps.blocks import AT_ONCE
from server.kernels.gpu_launch import LANES, PROGRAMS

FLOAT = 4
# Statistics of a method, and tensors of a number per row and head that it computes with at a time.
STATISTICS, TEMPORARIES = 4, 16
# Token, request, slot and position of a row, its tile's start and its slot's end, where it is among
# the requests, and whether its result was finite.
OF_A_ROW = 8 + 3 * 4 + 2 * 4 + 8 + 2


@dataclass(frozen=True, slots=True)
class Method:
    """What a method measures: its pools, and its parameters by layer and head."""

    pools: int
    parameters: int

    @property
    def columns(self) -> int:
        """Of its partials: plain and weighted pools, and the rest."""
        return 2 * self.pools + 1


@dataclass(frozen=True, slots=True)
class Largest:
    """The largest step of a rank.

    Attributes:
        rows: tokens, all of them calibrated.
        slots: requests.
        layers: of the model.
        query_heads, kv_heads: of this rank.
        head_dim: channels of a head.
    """

    rows: int
    slots: int
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int

    def room(self, methods: Sequence[Method]) -> int:
        """Bytes of all methods, one after the other in every layer."""
        layer = max((self._layer(method) for method in methods), default=0)
        kept = sum(self._tables(method) + self._done(method) for method in methods)
        block = FLOAT * AT_ONCE
        return layer + kept + block + len(methods) * self.rows * OF_A_ROW

    def _layer(self, method: Method) -> int:
        """Sums of splits, these together, log-sum-exps, and what coefficients are made of."""
        at_once = max(1, LANES * self.kv_heads // (self.query_heads * method.columns))
        # Rows are split where their programs are fewer than `PROGRAMS`.
        rows = 2 * self.rows + PROGRAMS * at_once // self.kv_heads
        sums = rows * self.query_heads * method.columns * (self.head_dim + 2)
        single = (TEMPORARIES + 2 * method.columns) * self.rows * self.query_heads
        return (sums + single) * FLOAT

    def _tables(self, method: Method) -> int:
        """Which heads of which request, and with which parameters."""
        each = 1 + FLOAT * method.parameters
        return self.layers * self.slots * self.query_heads * each

    def _done(self, method: Method) -> int:
        """What was done to rows, which the end of the step adds up."""
        each = 2 + FLOAT * (method.columns + STATISTICS)
        return self.layers * self.rows * self.query_heads * each
