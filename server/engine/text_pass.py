"""The text pass: a prompt without its images, run before it runs with them.

VHR compares what each head makes of the last prompt row with and without images. The front end has
the engine run the prompt without its image tokens first, as a request of its own that changes
nothing, and sends what that request saw along with the real one. So nothing is kept in a worker,
and neither preemption nor several choices nor other engines of a deployment need any care.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final, Literal, cast

import numpy as np

from calibrators.interface import (
    Bound,
    Coefficients,
    HeadOutputs,
    LayerPlan,
    Masses,
    Modality,
    Prefill,
    Prompt,
    Rows,
)
from calibrators.settings import CalibrationSettings

if TYPE_CHECKING:
    import torch

    from calibrators.interface import Calibrator, FloatArray, ModelFacts, Observation, Observed

# No package can register it and no client can name it: the space keeps it out of the registry.
NAME: Final = "text pass"
OUTPUTS = "head_outputs"


@dataclass(frozen=True, slots=True)
class LastRow(HeadOutputs):
    """Head outputs of a request that changes nothing: known in time however its prompt is cut."""

    prefills: ClassVar[frozenset[Prefill]] = frozenset(Prefill)


class TextPassSettings(CalibrationSettings):
    """It takes none."""

    method: Literal["text pass"] = NAME


class TextPass:
    """What a text pass is to a worker: a calibrator that looks and leaves everything alone."""

    name: ClassVar[str] = NAME
    title: ClassVar[str] = "Text pass"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.13949"
    modality: ClassVar[Modality] = "vision"
    causal: ClassVar[bool] = True
    touches_prompt_kv: ClassVar[bool] = False
    reweights: ClassVar[bool] = False
    revision: ClassVar[int] = 1
    pools: ClassVar[tuple[str, ...]] = ()
    parameters: ClassVar[tuple[str, ...]] = ()
    rescales: ClassVar[str | None] = None
    Settings: ClassVar[type[CalibrationSettings]] = TextPassSettings

    def bind(self, settings: CalibrationSettings, facts: ModelFacts) -> Bound:  # noqa: ARG002
        """Of no layer."""
        return text_pass(())

    def prefill(self, bound: Bound) -> Prefill:  # noqa: ARG002
        """Any chunks."""
        return Prefill.ANY

    def observe(self, bound: Bound, prompt: Prompt) -> Sequence[Observation]:  # noqa: ARG002
        """The last row, in its layers."""
        return [LastRow(layer) for layer in _layers(bound)]

    def rows(self, bound: Bound, prompt: Prompt) -> Rows:  # noqa: ARG002
        """None."""
        return Rows(first=prompt.length, generated=False)

    def resolve(
        self,
        bound: Bound,
        layer: int,
        facts: ModelFacts,
        prompt: Prompt,  # noqa: ARG002
        observed: Observed,
    ) -> LayerPlan | None:
        """Nothing to do, and what was seen as a detail of the report."""
        if layer not in _layers(bound):
            return None
        nobody = np.zeros(facts.query_heads, np.bool_)
        return LayerPlan(nobody, details={OUTPUTS: packed(observed[LastRow(layer)])})

    def coefficients(
        self,
        masses: Masses,
        parameters: Mapping[str, torch.Tensor],  # noqa: ARG002
    ) -> Coefficients:
        """Neutral ones; never asked for."""
        return Coefficients(rest=masses.rest.new_ones(masses.rest.shape))


def text_pass(layers: Iterable[int]) -> Bound:
    """The text pass of some layers."""
    chosen = sorted(layers)
    return Bound(NAME, {"layers": [*chosen]}, len(chosen), 0)


def text_layers(calibrations: Iterable[tuple[Calibrator, Bound]]) -> tuple[int, ...]:
    """Layers in which calibrations want to see the prompt without its images, ascending."""
    wanted = {
        observation.layer
        for calibrator, bound in calibrations
        for observation in calibrator.observe(bound, Prompt(0))
        if isinstance(observation, HeadOutputs) and observation.without_images
    }
    return tuple(sorted(wanted))


def _layers(bound: Bound) -> list[int]:
    return cast("list[int]", bound.params["layers"])


def packed(outputs: FloatArray) -> str:
    """Float32 in base64: as numbers, JSON would take several times as long."""
    return base64.b64encode(np.ascontiguousarray(outputs, np.float32).tobytes()).decode()


def unpacked(outputs: str, facts: ModelFacts) -> FloatArray:
    """`[query_heads, head_dim]`.

    Raises:
        ValueError: they are of another shape.
    """
    flat = np.frombuffer(base64.b64decode(outputs, validate=True), np.float32)
    return flat.reshape(facts.query_heads, facts.head_dim)
