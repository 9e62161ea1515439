"""A plug-in with a calibrator per kind of observation, each of which writes down what it saw.

Its source is installed by tests; it is not imported here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from calibrators.interface import (
    Bound,
    Coefficients,
    HeadOutputs,
    LayerPlan,
    Pool,
    Prefill,
    ProbabilityBlock,
    ResidualPeaks,
    Rows,
    Span,
)
from calibrators.settings import CalibrationSettings


class Observer:
    """Acts on what exceeds `bounds[layer]`, in those layers."""

    paper: ClassVar[str] = "https://example.org"
    modality: ClassVar[str] = "text"
    causal: ClassVar[bool] = True
    touches_prompt_kv: ClassVar[bool] = True
    reweights: ClassVar[bool] = True
    revision: ClassVar[int] = 1
    pools: ClassVar[tuple[str, ...]] = ("found",)
    parameters: ClassVar[tuple[str, ...]] = ("strength",)
    rescales: ClassVar[str | None] = None

    def bind(self, settings: Any, facts: Any) -> Bound:
        params = settings.model_dump(exclude={"method"})
        layers = len(params["bounds"])
        return Bound(self.name, params, layers, layers * facts.query_heads)

    def prefill(self, bound: Any) -> Prefill:
        return Prefill.ANY

    def rows(self, bound: Any, prompt: Any) -> Rows:
        return Rows()

    def resolve(self, bound: Any, layer: int, facts: Any, prompt: Any, observed: Any) -> Any:
        limit = bound.params["bounds"].get(str(layer))
        if not observed or limit is None:
            return None
        (seen,) = observed.values()
        folder = Path(os.environ["OBSERVED"], bound.params["record"], str(layer))
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{len(list(folder.iterdir())):04}.npy", seen)
        return self.act(bound.params, seen, limit, facts)

    def act(self, params: Any, seen: Any, limit: float, facts: Any) -> LayerPlan:
        found = self.found(params, seen, limit).astype(np.int32)
        strength = np.full(facts.query_heads, 0.3, np.float32)
        heads = np.ones(facts.query_heads, np.bool_)
        pools, statistics = (Pool(found),), {"found": float(len(found))}
        return LayerPlan(heads, {"strength": strength}, pools, statistics=statistics)

    def coefficients(self, masses: Any, parameters: Any) -> Coefficients:
        strength, mass = parameters["strength"], masses.plain[..., 0]
        rest = 1 / (1 + (strength - 1) * mass)
        apply = (mass > 0) & (1 - mass > 1e-6)
        return Coefficients(rest, (strength * rest)[..., None], apply=apply)


class PeaksSettings(CalibrationSettings):
    method: Literal["peaks"] = "peaks"
    record: str = ""
    bounds: dict[str, float]
    channels: list[int]


class Peaks(Observer):
    """Turns down tokens that stand out in the residual stream."""

    name: ClassVar[str] = "peaks"
    title: ClassVar[str] = "Peaks"
    Settings: ClassVar[type] = PeaksSettings

    def observe(self, bound: Any, prompt: Any) -> Any:
        channels = tuple(bound.params["channels"])
        return [ResidualPeaks(int(layer), channels) for layer in bound.params["bounds"]]

    def found(self, params: Any, seen: Any, limit: float) -> Any:
        return np.flatnonzero(seen > limit)


class BlockSettings(CalibrationSettings):
    method: Literal["block"] = "block"
    record: str = ""
    bounds: dict[str, float]
    source: int
    at: list[int]
    spans: list[list[int]]


class Block(Observer):
    """Turns down keys that some rows of one layer look at, from the last prompt row on."""

    name: ClassVar[str] = "block"
    title: ClassVar[str] = "Block"
    Settings: ClassVar[type] = BlockSettings

    def prefill(self, bound: Any) -> Prefill:
        return Prefill.SPLIT_LAST

    def rows(self, bound: Any, prompt: Any) -> Rows:
        return Rows(first=prompt.length - 1)

    def observe(self, bound: Any, prompt: Any) -> Any:
        params = bound.params
        spans = tuple(Span(*span) for span in params["spans"])
        return [ProbabilityBlock(params["source"], tuple(params["at"]), spans)]

    def found(self, params: Any, seen: Any, limit: float) -> Any:
        keys = np.concatenate([np.arange(*span) for span in params["spans"]])
        return keys[seen.mean((0, 1)) > limit]


class LoudSettings(CalibrationSettings):
    method: Literal["loud"] = "loud"
    record: str = ""
    bounds: dict[str, float]
    whole: bool


class Loud(Observer):
    """Turns down heads whose output at the last prompt row is long."""

    name: ClassVar[str] = "loud"
    title: ClassVar[str] = "Loud"
    causal: ClassVar[bool] = False
    reweights: ClassVar[bool] = False
    pools: ClassVar[tuple[str, ...]] = ()
    Settings: ClassVar[type] = LoudSettings

    def prefill(self, bound: Any) -> Prefill:
        return Prefill.WHOLE if bound.params["whole"] else Prefill.SPLIT_LAST

    def rows(self, bound: Any, prompt: Any) -> Rows:
        return Rows(first=0 if bound.params["whole"] else prompt.length - 1)

    def observe(self, bound: Any, prompt: Any) -> Any:
        return [HeadOutputs(int(layer)) for layer in bound.params["bounds"]]

    def act(self, params: Any, seen: Any, limit: float, facts: Any) -> LayerPlan:
        heads = np.linalg.norm(seen, axis=1) > limit
        strength = np.full(facts.query_heads, 0.3, np.float32)
        return LayerPlan(heads, {"strength": strength}, statistics={"found": float(heads.sum())})

    def coefficients(self, masses: Any, parameters: Any) -> Coefficients:
        strength = parameters["strength"]
        return Coefficients(torch.ones_like(strength), scale=strength)


ENTRY_POINTS = """
[trimtab.calibrators]
peaks = observers:Peaks
block = observers:Block
loud = observers:Loud
"""
