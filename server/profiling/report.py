"""A finished search as tables and as a page, in Markdown that reads well on a terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence

from server.evaluation.report import aligned, percent
from server.profiling.course import Scored
from server.profiling.result import Result
from server.profiling.search import Score

NOTES = """\
Brackets hold 95 % intervals: Wilson's for shares, a bootstrap over samples for their difference,
Student's for entropies. p is of the exact McNemar test. The parameters were chosen on the search
samples alone; the report samples were asked once, with the chosen ones."""


def stage_table(scored: Scored) -> str:
    """A line per candidate of a stage."""
    names = list(scored.scores[0])
    rows = [
        (candidate.label, *(_cell(name, score) for name in names))
        for candidate, score in zip(scored.stage.candidates, scored.scores, strict=True)
    ]
    return aligned([(scored.stage.name, *(name.replace("_", " ") for name in names)), *rows])


def outcome_table(result: Result) -> str:
    """Baseline and profile on the report samples."""
    return aligned(result.outcome.rows)


def summary(result: Result) -> str:
    """What was chosen and whether it helps."""
    return "\n".join(
        [
            f"Chosen: {json.dumps(dict(result.course.choice.parameters))}",
            *result.course.choice.remarks,
            result.outcome.change,
            result.outcome.verdict,
        ]
    )


def page(result: Result, pictures: Sequence[str]) -> str:
    """The whole report."""
    search, report = result.samples
    facts = [
        f"- model: {result.model}",
        f"- data: {result.data.name}, SHA-256 {result.data.sha256}",
        f"- samples: {search} searched, {report} reported on, seed {result.seed}",
        f"- Trimtab {result.versions['version']}, vLLM {result.versions['vllm_version']}",
        f"- settings: {json.dumps(dict(result.settings))}",
    ]
    parts = [
        f"# Profile {result.name}: {result.method}",
        "\n".join(facts),
        "\n\n".join(summary(result).splitlines()),
        outcome_table(result),
        NOTES,
        *(f"![{name}]({name})" for name in pictures),
        *map(stage_table, result.course.stages),
    ]
    return "\n\n".join(parts) + "\n"


def _cell(name: str, score: Score) -> str:
    value = score[name]
    return percent(value) if name in ("accuracy", "valid") else f"{value:.4f}"
