"""From measured seconds to ratios with their spread."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from server.overhead.spread import Spread, paired


def of_medians(
    numerators: Sequence[Sequence[float]], denominators: Sequence[Sequence[float]]
) -> Spread:
    """Ratio of the medians of all measurements; spread over the starts they came from.

    Args:
        numerators: seconds by server start.
        denominators: the same of the other server, started in turn with it.
    """
    middle = statistics.median(_flat(numerators)) / statistics.median(_flat(denominators))
    starts = paired(
        [statistics.median(start) for start in numerators],
        [statistics.median(start) for start in denominators],
    )
    return Spread(middle, min(starts.low, middle), max(starts.high, middle))


def _flat(groups: Iterable[Iterable[float]]) -> list[float]:
    return [value for group in groups for value in group]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)
