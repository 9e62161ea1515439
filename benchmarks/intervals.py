"""How sure a figure is: Wilson's interval, and the bootstrap over scenes."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from benchmarks.objects import Share

CONFIDENCE = 0.95
DRAWS = 2000
_Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure with its interval of 95 %."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1%} ({self.low:.1%}..{self.high:.1%})"


def wilson(hits: float, count: float) -> Figure:
    """A share of independent trials (Wilson, 1927); good for shares of nearly none or all."""
    if count == 0:
        return Figure(0.0, 0.0, 1.0)
    share, weight = hits / count, _Z**2 / count
    middle = (share + weight / 2) / (1 + weight)
    reach = _Z * np.sqrt(share * (1 - share) / count + weight / (4 * count)) / (1 + weight)
    return Figure(share, float(max(middle - reach, 0.0)), float(min(middle + reach, 1.0)))


def figure(share: Share, seed: int = 0) -> Figure:
    """The share with its interval.

    Wilson's where every scene is one trial; else scenes are drawn again, because questions about
    one picture are not independent.
    """
    if all(whole == 1 for whole in share.wholes):
        return wilson(sum(share.parts), len(share.wholes))
    low, high = np.quantile(_drawn(share, _draws(share, seed)), _tails())
    return Figure(share.value, float(low), float(high))


def difference(share: Share, reference: Share, seed: int = 0) -> Figure:
    """`share` minus `reference` on the same scenes, which are drawn again in pairs."""
    draws = _draws(share, seed)
    values = _drawn(share, draws) - _drawn(reference, draws)
    low, high = np.quantile(values, _tails())
    return Figure(share.value - reference.value, float(low), float(high))


def _tails() -> tuple[float, float]:
    return (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2


def _draws(share: Share, seed: int) -> np.ndarray:
    """How often each scene is drawn, `[DRAWS, scenes]`."""
    scenes = len(share.parts)
    return np.random.default_rng(seed).multinomial(scenes, [1 / scenes] * scenes, size=DRAWS)


def _drawn(share: Share, draws: np.ndarray) -> np.ndarray:
    wholes = draws @ np.array(share.wholes)
    return (draws @ np.array(share.parts)) / np.where(wholes == 0, 1, wholes)
