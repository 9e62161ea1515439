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

    def since(self, name: str, before: Mapping[str, Report]) -> Report | None:
        """The report of a request, from the one that it goes on from; None if it took no part."""
        report = before.get(name)
        if report is None or name not in self.requests:
            return None
        tallies = [*report.tallies]
        for gain in self.gains:
            for row, (owner, place) in enumerate(gain.owners):
                if owner == name:
                    tokens, count, *sums = gain.numbers[:, row].tolist()
                    more = dict(zip(gain.statistics, sums, strict=True))
                    tallies[place] = tallies[place].plus(int(tokens), int(count), more)
        return Report(report.ticket, tallies)


Reports: TypeAlias = Mapping[str, Report] | Progress
"""Of a step; empty where nothing was calibrated."""


def report_of(name: str, reports: Reports, before: Mapping[str, Report]) -> Report | None:
    """The report of a request in a step, None if it took no part; `before` as of `since`."""
    if isinstance(reports, Progress):
        return reports.since(name, before)
    return reports.get(name)


def seconds_of(reports: Reports) -> Mapping[str, float]:
    """What a step spent in calibration, by calibrator."""
    if isinstance(reports, Progress):
        return reports.seconds
    return next((report.seconds for report in reports.values() if report.seconds), {})
