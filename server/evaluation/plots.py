"""Pictures of an evaluation, with matplotlib where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from server.evaluation.comparison import Row

MISSING = "no plots: matplotlib is not installed; `pip install 'trimtab[eval]'` brings it"
NAME_LENGTH = 60


def available() -> bool:
    """Whether plots can be made here."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write a picture of the accuracies and one of what changed, as far as there are rows."""
    import matplotlib

    # Needs no display.
    matplotlib.use("Agg")
    drawn = []
    if any(row.run is not None for row in rows):
        drawn.append(_saved(_accuracies(rows), folder / "accuracy.png"))
    if any(row.difference is not None for row in rows):
        drawn.append(_saved(_changes(rows), folder / "changes.png"))
    return drawn


def _accuracies(rows: Sequence[Row]) -> Any:  # noqa: ANN401 - matplotlib is not typed here
    """Accuracies with their intervals; a line at the baseline's."""
    shares = {_short(row): row.run.accuracy for row in rows if row.run is not None}
    figure, axes = _canvas(len(shares))
    for place, share in enumerate(shares.values()):
        axes.errorbar(
            share.value,
            place,
            xerr=[[share.value - share.low], [share.high - share.value]],
            fmt="o",
            color="tab:gray" if place == 0 else "tab:blue",
            capsize=4,
        )
    if rows[0].run is not None:
        axes.axvline(rows[0].run.accuracy.value, color="tab:gray", linestyle=":")
    _finish(axes, list(shares), "accuracy, with 95 % interval")
    return figure


def _changes(rows: Sequence[Row]) -> Any:  # noqa: ANN401
    """Samples gained and lost against the baseline."""
    changes = {_short(row): row.difference for row in rows if row.difference is not None}
    figure, axes = _canvas(len(changes))
    places = range(len(changes))
    axes.barh(places, [d.gained for d in changes.values()], color="tab:green", label="gained")
    axes.barh(places, [-d.lost for d in changes.values()], color="tab:red", label="lost")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.legend()
    _finish(axes, list(changes), "samples that became right or wrong")
    return figure


def _canvas(rows: int) -> Any:  # noqa: ANN401
    # Without pyplot, which keeps every figure for the whole process.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.5 + 0.5 * rows), layout="constrained")
    return figure, figure.subplots()


def _finish(axes: Any, names: Sequence[str], title: str) -> None:  # noqa: ANN401
    # Names are JSON: a dollar sign in them is no formula.
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel(title)


def _saved(figure: Any, file: Path) -> Path:  # noqa: ANN401
    figure.savefig(file, dpi=120)
    return file


def _short(row: Row) -> str:
    name = row.name
    return name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 3]}..."
