"""From what a calibrator asks to see to the taps that measure it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING

from calibrators.interface import (
    ColumnMeans,
    HeadOutputs,
    Prefill,
    ProbabilityBlock,
    ResidualPeaks,
)
from server.engine.taps.blocks import BlockTap
from server.engine.taps.columns import ColumnTap
from server.engine.taps.heads import HeadTap
from server.engine.taps.peaks import PeakTable, PeakTap
from server.engine.taps.text import TextTap
from server.engine.text_pass import unpacked

if TYPE_CHECKING:
    from calibrators.interface import Bound, Calibrator, ModelFacts, Observation, Prompt, Rows
    from server.engine.taps.tap import Tap


def make_taps(
    calibrator: Calibrator,
    bound: Bound,
    prompt: Prompt,
    rows: Rows,
    facts: ModelFacts,
    own: slice,
    table: PeakTable,
    text_outputs: Mapping[str, str],
) -> tuple[Tap, ...]:
    """A tap per observation of a request.

    Raises:
        NotImplementedError: an observation cannot be measured, or not in time.
        ValueError: an observation is not of this model or prompt.
    """
    observations = calibrator.observe(bound, prompt)
    prefill, ordinal = calibrator.prefill(bound), count()
    taps: list[Tap] = []
    for observation in observations:
        if observation.layer not in range(facts.layers) or prefill not in observation.prefills:
            raise NotImplementedError(f"{observation} cannot be measured with {prefill}")
        if isinstance(observation, ColumnMeans):
            if not set(observation.heads or ()) <= set(range(facts.query_heads)):
                raise ValueError(f"{observation} is not of heads of this model")
            taps.append(ColumnTap(observation, prompt.length, own))
        elif isinstance(observation, ResidualPeaks):
            _check_peaks(observation, calibrator, facts)
            key = calibrator.name, next(ordinal)
            taps.append(PeakTap(observation, prompt.length, table, key))
        elif isinstance(observation, HeadOutputs) and observation.without_images:
            seen = text_outputs.get(str(observation.layer))
            outputs = None if seen is None else unpacked(seen, facts)
            taps.append(TextTap(observation, prompt.length, outputs))
        elif isinstance(observation, HeadOutputs):
            taps.append(HeadTap(observation, prompt.length))
        elif isinstance(observation, ProbabilityBlock):
            _check_block(observation, prompt)
            taps.append(BlockTap(observation, own.stop - own.start))
        else:
            raise NotImplementedError(f"{observation} cannot be measured")
    _check_rows(observations, prefill, rows, prompt)
    return tuple(taps)


def _check_peaks(observation: ResidualPeaks, calibrator: Calibrator, facts: ModelFacts) -> None:
    channels = observation.channels
    if not channels or not all(channel in range(facts.hidden_size) for channel in channels):
        raise ValueError(f"{observation} is not of channels of the residual stream")
    if not calibrator.touches_prompt_kv:
        raise NotImplementedError("peaks of cached KV that is shared with everybody")


def _check_block(observation: ProbabilityBlock, prompt: Prompt) -> None:
    rows, last = observation.rows, prompt.length - 1
    if [*rows] != sorted(set(rows)) or not all(row in range(last) for row in rows):
        raise ValueError("rows of a block are not ascending, before the last of the prompt")
    if not all(0 <= span.start <= span.stop <= prompt.length for span in observation.keys):
        raise ValueError("keys of a block are not within the prompt")


def _check_rows(
    observations: Sequence[Observation], prefill: Prefill, rows: Rows, prompt: Prompt
) -> None:
    """Rows before the last would come out otherwise where they are computed again."""
    late = any(isinstance(each, (HeadOutputs, ProbabilityBlock)) for each in observations)
    if late and prefill is Prefill.SPLIT_LAST and rows.first < prompt.length - 1:
        raise ValueError("rows are calibrated before what they depend on is measured")
