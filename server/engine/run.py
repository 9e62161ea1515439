"""Steps in which the same calibrated requests generate one token each: most of all steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from server.engine.coefficients import Done
from server.engine.progress import Gain, Progress
from server.engine.step import MethodStep, StepPlan


class Run:
    """The plan of a step, used again for those after it.

    Rows stay what they are and see one key more each. What is done is added up by row, reported as
    the progress that it is, and comes to the tallies when the run is over.

    Args:
        plan: of the first step, which is reported by itself.
        changes: of the table of requests, when it was made; another number ends it.
        request_ids: by row of the batch.
        lengths: `[rows of the batch]`, tokens of each request after that step.
    """

    def __init__(
        self,
        plan: StepPlan,
        changes: int,
        request_ids: Sequence[str],
        lengths: npt.NDArray[Any],
    ) -> None:
        self.plan = plan
        self.changes, self._ids = changes, [*request_ids]
        self._rows = np.array([member.row for member in plan.batch])
        self._lengths = lengths[self._rows]
        self._names = [self._ids[row] for row in self._rows]
        self._steps = 0
        self._sums = [_Sums(method, self._ids) for method in plan.methods]

    @staticmethod
    def begins(plan: StepPlan) -> bool:
        """Whether a step may be the first: everything in it is a token that was never seen."""
        return all(
            member.stop - member.start == 1
            and member.start >= max(member.request.covered, member.request.prompt.length)
            and not member.request.failed
            for member in plan.batch
        )

    @property
    def under_way(self) -> bool:
        """Whether the plan was used again."""
        return self._steps > 0

    def goes_on(
        self,
        request_ids: Sequence[str],
        starts: npt.NDArray[Any],
        lengths: npt.NDArray[Any],
    ) -> bool:
        """Move on by a token where a batch allows it.

        Args:
            request_ids: by row of the batch.
            starts: `[rows + 1]`, where each request's tokens start in the query tensor.
            lengths: `[rows]`, tokens of each request after this step.
        """
        if request_ids != self._ids:
            return False
        rows = self._rows
        grown = lengths[rows] == self._lengths + 1
        if not (grown & (starts[rows + 1] - starts[rows] == 1)).all():
            return False
        self._lengths += 1
        self._steps += 1
        for method in self.plan.methods:
            method.advance(starts)
        return True

    def finish(self) -> Progress | None:
        """What was done so far; None where a result is not finite, and the run has to end."""
        done = [sums.add() for sums in self._sums]
        if not all(one.finite.all() for one in done):
            return None
        gains = [sums.gain() for sums in self._sums]
        seconds = {method.calibrator.name: method.seconds for method in self.plan.methods}
        return Progress(self._names, gains, seconds)

    def end(self) -> Mapping[str, float]:
        """Hand everything to the tallies; seconds of the last step by calibrator."""
        for sums in self._sums:
            sums.settle()
        for member in self.plan.batch:
            member.request.covered = max(member.request.covered, member.stop + self._steps)
        return {method.calibrator.name: method.seconds for method in self.plan.methods}


class _Sums:
    """What one method did, by row."""

    def __init__(self, method: MethodStep, request_ids: Sequence[str]) -> None:
        self._method = method
        self._owners = method.owners
        self._places = tuple(
            (request_ids[member.row], member.request.programs.index(program))
            for member, program in self._owners
        )
        self._statistics: tuple[str, ...] = ()
        self._numbers = np.zeros((2, len(self._owners)))

    def add(self) -> Done:
        """Add a step; what was done in it."""
        done = self._method.done()
        for row in np.flatnonzero(~done.finite):
            self._owners[row][0].request.failed = True
        missing = [name for name in done.sums if name not in self._statistics]
        if missing:
            self._statistics = (*self._statistics, *missing)
            room = np.zeros((len(missing), len(self._owners)))
            self._numbers = np.concatenate([self._numbers, room])
        self._numbers[0] += done.rewritten
        self._numbers[1] += done.count
        for name, values in done.sums.items():
            self._numbers[2 + self._statistics.index(name)] += values
        return done

    def gain(self) -> Gain:
        """All steps so far."""
        return Gain(self._places, self._statistics, self._numbers.copy())

    def settle(self) -> None:
        """Put it into the tallies."""
        columns = self._numbers.T.tolist()
        for (_, program), (tokens, count, *sums) in zip(self._owners, columns, strict=True):
            tally = program.tally
            tally.completion_tokens += int(tokens)
            tally.count += int(count)
            for name, total in zip(self._statistics, sums, strict=True):
                tally.sums[name] = tally.sums.get(name, 0.0) + total
