"""A calibrator that looks across the heads of a layer, as an installed distribution.

A third of the prompt is weighted key by key; the next third takes part of it, by a factor that all
selected heads have in common.
"""

from __future__ import annotations

from pathlib import Path

from tests.integration import plugins

COUPLED = """
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
import torch
from vllm.distributed.parallel_state import get_tp_group

from calibrators.interface import Coefficients, ColumnMeans, Pool, Prefill
from calibrators.zerotuning import ZeroTuning, ZeroTuningSettings


class CoupledSettings(ZeroTuningSettings):
    method: Literal["coupled"] = "coupled"


def last_rank():
    group = get_tp_group()
    return group.rank_in_group == group.world_size - 1


class Coupled(ZeroTuning):
    name: ClassVar[str] = "coupled"
    title: ClassVar[str] = "Coupled"
    Settings: ClassVar[type] = CoupledSettings
    pools: ClassVar[tuple[str, ...]] = ("weighted", "scaled")
    rescales: ClassVar[str | None] = None
    across_heads: ClassVar[bool] = True

    def resolve(self, bound, layer, facts, prompt, observed):
        if bound.params["gamma"] == 99 and last_rank():
            raise RuntimeError("on purpose")
        plan = super().resolve(bound, layer, facts, prompt, observed)
        if plan is None:
            return None
        third = prompt.length // 3
        weights = np.exp(np.linspace(0, min(bound.params["gamma"], 5), third))
        first, second = np.arange(third), np.arange(third, 2 * third)
        return replace(plan, pools=(Pool(first, weights), Pool(second)))

    def coefficients(self, masses, parameters):
        if (parameters["gamma"] == 98).any() and last_rank():
            raise RuntimeError("on purpose")
        first, second = masses.plain.unbind(-1)
        weighted = masses.weighted[..., 0]
        common = weighted.sum(1, keepdim=True) / first.sum(1, keepdim=True).clamp_min(1e-6)
        total = weighted + common * second + (1 - first - second)
        none = torch.zeros_like(first)
        return Coefficients(
            rest=1 / total,
            pools=torch.stack([none, common / total], -1),
            weighted=torch.stack([1 / total, none], -1),
            apply=first > 0,
            statistics={"weighted_mass_before": first, "weighted_mass_after": weighted / total},
        )


class SightedSettings(ZeroTuningSettings):
    method: Literal["sighted"] = "sighted"


class Sighted(Coupled):
    name: ClassVar[str] = "sighted"
    title: ClassVar[str] = "Sighted"
    Settings: ClassVar[type] = SightedSettings
    causal: ClassVar[bool] = False

    def prefill(self, bound):
        return Prefill.WHOLE

    def observe(self, bound, prompt):
        return [ColumnMeans(layer) for layer in (1, 2, 3)]

    def resolve(self, bound, layer, facts, prompt, observed):
        if not observed:
            return None
        if bound.params["gamma"] == 97 and layer == 2 and last_rank():
            raise RuntimeError("on purpose")
        plan = super().resolve(bound, layer, facts, prompt, observed)
        first, second = plan.pools
        means = observed[ColumnMeans(layer)]
        # Of each head, and of all of them.
        weights = 1 + prompt.length * (means + means.mean(0))[:, : len(first.keys)]
        return replace(plan, pools=(replace(first, weights=list(weights)), second))
"""


def install(folder: Path) -> dict[str, str]:
    """Put the distribution into `folder`; the environment in which it is found."""
    entry_points = "[trimtab.calibrators]\ncoupled = coupled:Coupled\nsighted = coupled:Sighted\n"
    return plugins.install(folder, "coupled", COUPLED, entry_points)
