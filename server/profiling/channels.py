"""Which channels of the residual stream mark sinks, and from what peak on a token is one.

Knows numbers only: `|x| / rms(x)` of prompts, layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

# Neighbours that are further apart than this part clearly.
CLEAR = 2.0
# Digits of a proposed tau: it is no measurement.
SIGNIFICANT = 3

Scaled: TypeAlias = npt.NDArray[np.float32]
"""`[tokens, channels]`: what enters a layer, its magnitude in root mean squares of the token."""
Peaks: TypeAlias = tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]
"""Of the tokens that a layer sees: the largest of the chosen channels, and which are of images."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A prompt on its way through a model.

    Attributes:
        layers: what enters each layer that is looked at.
        images: bool `[tokens]`, which tokens are of images.
    """

    layers: Iterable[Scaled]
    images: npt.NDArray[np.bool_]


class NoSinks(Exception):
    """No channel marks sinks; says what was looked for."""


@dataclass(frozen=True, slots=True)
class Channels:
    """Channels that mark sinks.

    Attributes:
        sink_dims: ascending.
        tau: tokens with a higher peak there are sinks.
        remarks: how they came about, in sentences.
    """

    sink_dims: tuple[int, ...]
    tau: float
    remarks: tuple[str, ...] = ()


def find(look: Callable[[], Iterable[Seen]], peak: float, tau: float | None = None) -> Channels:
    """Channels that mark sinks in most layers and prompts, and a tau for them.

    A channel marks sinks where some token has it above `peak`, and above `peak` times what the
    median token has. The proposed tau is the geometric mean of two neighbours among the peaks of
    all tokens: of those in the upper half that begin at `peak` or below, the furthest apart.

    Args:
        look: gives the prompts, the same each time; it is called twice, so that no stream has to
            be kept.
        peak: in root mean squares, above 1.
        tau: in place of the proposed one.

    Raises:
        NoSinks: there is no such channel.
    """
    marked = [_stands_out(scaled, peak) for seen in look() for scaled in seen.layers]
    (dims,) = np.nonzero(np.mean(marked, 0) > 0.5)
    if not dims.size:
        raise NoSinks(
            f"no channel has tokens that stand out by {peak:g} root mean squares in most layers; "
            "a lower --peak finds more, --sink-dims names channels that are known"
        )
    peaks = [(scaled[:, dims].max(1), seen.images) for seen in look() for scaled in seen.layers]
    below, above = _gap(np.concatenate([values for values, _ in peaks]), peak)
    if tau is None:
        tau = float(f"{np.sqrt(below * above):.{SIGNIFICANT}g}")
    told = (
        f"In channels {', '.join(map(str, dims))} tokens stand out by {peak:g} root mean squares. "
        f"Peaks are apart between {below:.3g} and {above:.3g}."
    )
    doubts = ["That is not far: look at receipts."] if above < CLEAR * below else []
    return Channels(tuple(map(int, dims)), tau, (told, *doubts, *_counted(peaks, tau)))


def _stands_out(scaled: Scaled, peak: float) -> npt.NDArray[np.bool_]:
    """Channels that mark sinks in one layer and prompt; bool `[channels]`."""
    marks: npt.NDArray[np.bool_] = scaled.max(0) > peak * np.maximum(np.median(scaled, 0), 1)
    return marks


def _gap(peaks: npt.NDArray[np.float32], peak: float) -> tuple[float, float]:
    """The two neighbours. Some peaks are above `peak`."""
    ordered = np.sort(peaks.astype(np.float64)).clip(np.finfo(np.float64).tiny)
    last = int((ordered[:-1] <= peak).sum()) - 1
    starts = range(max(min(len(ordered) // 2, last), 0), max(last, 0) + 1)
    at = max(starts, key=lambda i: ordered[i + 1] / ordered[i])
    return float(ordered[at]), float(ordered[at + 1])


def _counted(peaks: list[Peaks], tau: float) -> list[str]:
    """Which tokens are sinks."""
    sinks = [(values > tau, images) for values, images in peaks]
    first = np.mean([of[0] for of, _ in sinks])
    visual = np.mean([of[images].sum() for of, images in sinks])
    text = np.mean([of[~images].sum() for of, images in sinks])
    told = (
        f"With tau {tau:g} the first token is a sink in {first:.0%} of layers and prompts, and a "
        f"prompt has {visual:.1f} sinks in images and {text:.1f} elsewhere, on average."
    )
    return [told] if visual else [told, "No image token is a sink: VAR has nothing to do."]
