"""A finished search, as a profile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from calibrators import profiles
from calibrators.profiles import ModelIdentity, Profile, Provenance
from server.evaluation.samples import Dataset
from server.evaluation.statistics import CONFIDENCE
from server.profiling.course import Course, Scored
from server.profiling.entropies import Entropies
from server.profiling.outcome import Accuracies

DIGITS = 6


@dataclass(frozen=True, slots=True)
class Result:
    """All that a search gives.

    Attributes:
        name: of the profile.
        method: name of the calibrator.
        model: that was served.
        versions: of Trimtab and vLLM.
        data: that was searched and reported on.
        seed: of splits and draws.
        samples: numbers of search and of report samples.
        settings: of the search.
        course: its stages and choice.
        outcome: of the choice on the report samples.
    """

    name: str
    method: str
    model: ModelIdentity
    versions: Mapping[str, str]
    data: Dataset
    seed: int
    samples: tuple[int, int]
    settings: Mapping[str, Any]
    course: Course
    outcome: Accuracies | Entropies

    def profile(self) -> Profile:
        """The profile, whether it helps or not: its provenance says which."""
        search, report = self.samples
        baseline, result = self.outcome.estimates
        return Profile(
            format=profiles.FORMAT,
            name=self.name,
            model=self.model,
            method=self.method,
            parameters=dict(self.course.choice.parameters),
            provenance=Provenance(
                data=profiles.Data(name=self.data.name, sha256=self.data.sha256),
                split=profiles.Split(seed=self.seed, search=search, report=report),
                metric=self.outcome.metric,
                baseline=baseline,
                result=result,
                confidence=CONFIDENCE,
                date=datetime.now(UTC).date().isoformat(),
                trimtab=self.versions["version"],
                search=self._search(),
            ),
        )

    def _search(self) -> dict[str, Any]:
        return {
            "vllm": self.versions["vllm_version"],
            "settings": {name: _plain(value) for name, value in self.settings.items()},
            "stages": [_stage(scored) for scored in self.course.stages],
            "remarks": [*self.course.choice.remarks],
            "report": {"verdict": self.outcome.verdict, **asdict(self.outcome)},
        }


def _stage(scored: Scored) -> dict[str, Any]:
    candidates = {
        candidate.label: {name: round(value, DIGITS) for name, value in score.items()}
        for candidate, score in zip(scored.stage.candidates, scored.scores, strict=True)
    }
    return {
        "stage": scored.stage.name,
        "samples at most": scored.stage.limit,
        "candidates": candidates,
    }


def _plain(value: object) -> Any:  # noqa: ANN401 - JSON
    return list(value) if isinstance(value, tuple) else value
