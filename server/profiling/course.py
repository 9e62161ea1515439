"""A search and the scores it was sent, stage by stage."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from server.profiling.search import Choice, Score, Search, Stage


@dataclass(frozen=True, slots=True)
class Scored:
    """A stage and the scores of its candidates, in their order."""

    stage: Stage
    scores: tuple[Score, ...]


@dataclass(frozen=True, slots=True)
class Course:
    """What a search has found and how."""

    choice: Choice
    stages: tuple[Scored, ...]


async def run(search: Search, score: Callable[[Stage], Awaitable[list[Score]]]) -> Course:
    """Score whatever the search asks for, until it has chosen.

    Raises:
        SearchFailed: of the search.
    """
    stages: list[Scored] = []
    try:
        stage = next(search)
        while True:
            scores = await score(stage)
            stages.append(Scored(stage, tuple(scores)))
            stage = search.send(scores)
    except StopIteration as stop:
        return Course(stop.value, tuple(stages))
