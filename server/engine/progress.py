"""What steps add to the last reports of the same requests, in arrays in place of objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from server.engine.payload import Report


@dataclass(frozen=True, slots=True)
class Gain:
    """What one method adds.

    Attributes:
        owners: by row, a request and the place of the method among its calibrations.
        statistics: names.
        numbers: float64 `[2 + statistics, rows]`: calibrated tokens, what statistics are over, and
            their sums.
    """

    owners: Sequence[tuple[str, int]]
    statistics: Sequence[str]
    numbers: npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Progress:
    """What was done since the last step that reported each request by itself.

    Attributes:
        requests: that took part in the step.
        gains: one per method.
        seconds: as of `Report`.
    """

    requests: Sequence[str]
    gains: Sequence[Gain]
    seconds: Mapping[str, float]

    def since(self, reports: Mapping[str, Report]) -> Mapping[str, Report]:
        """The reports of the step, from those that it goes on from."""
        tallies = {name: [*reports[name].tallies] for name in self.requests if name in reports}
        for gain in self.gains:
            columns = gain.numbers.T.tolist()
            for (name, index), (tokens, count, *sums) in zip(gain.owners, columns, strict=True):
                if name in tallies:
                    more = dict(zip(gain.statistics, sums, strict=True))
                    tallies[name][index] = tallies[name][index].plus(int(tokens), int(count), more)
        seconds: Mapping[str, float] | None = self.seconds
        found = {}
        for name, own in tallies.items():
            found[name] = Report(reports[name].ticket, own, seconds)
            seconds = None
        return found


Reports: TypeAlias = Mapping[str, Report] | Progress
"""Of a step; empty where nothing was calibrated."""
