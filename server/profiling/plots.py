"""A picture of what each probed head does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from server.profiling.course import Course
from server.profiling.search import Objective

PROBE = "probe"


def draw(course: Course, objective: Objective, file: Path) -> Path:
    """Write the effect of every probe against the baseline, a panel for each measure.

    Args:
        course: with a stage `probe` whose first candidate is the baseline.
        objective: names the measures.
        file: of the picture, PNG.
    """
    import matplotlib

    # Needs no display, nor pyplot, which keeps every figure for the whole process.
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    probed = next(scored for scored in course.stages if scored.stage.name == PROBE)
    labels = [candidate.label for candidate in probed.stage.candidates[1:]]
    baseline, *scores = probed.scores
    names = [name for name in objective.names if name in baseline]
    figure = Figure(figsize=(1 + 5 * len(names), 1.5 + 0.3 * len(labels)), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        _bars(axes, [score[name] - baseline[name] for score in scores], objective.sign)
        axes.set_xlabel(f"{name}, change against the baseline")
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].invert_yaxis()
    figure.savefig(file, dpi=120)
    return file


def _bars(axes: Any, changes: list[float], sign: int) -> None:  # noqa: ANN401
    colours = ["tab:green" if sign * change > 0 else "tab:red" for change in changes]
    axes.barh(range(len(changes)), changes, color=colours)
    axes.axvline(0, color="black", linewidth=0.8)
