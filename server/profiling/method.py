"""The search that a command line asks for."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from calibrators.profiles import ModelIdentity
from server.evaluation.command import Unusable
from server.profiling import act, gift, var, zerotuning
from server.profiling.channels import Channels
from server.profiling.search import ACCURACY, Objective, Search

SEEING = frozenset({"var", "gift"})
"""Methods that look at images."""


@dataclass(frozen=True, slots=True)
class Method:
    """A search, ready to run.

    Attributes:
        search: not begun.
        objective: what makes one of its candidates better than another.
        settings: of the plan.
    """

    search: Search
    objective: Objective
    settings: Mapping[str, Any]

    @classmethod
    def of(
        cls, args: argparse.Namespace, model: ModelIdentity, channels: Channels | None
    ) -> Method:
        """The search of parsed flags for a model.

        Args:
            args: parsed flags.
            model: that is served.
            channels: that mark its sinks, for VAR.

        Raises:
            Unusable: the model has too few layers.
        """
        if channels is not None:
            return _var(args, channels)
        return _PLANNED[args.method](args, model)


def _zerotuning(args: argparse.Namespace, model: ModelIdentity) -> Method:
    plan = zerotuning.Plan(
        model.query_heads, args.probe_gamma, args.top, args.grid, args.unsupervised
    )
    return Method(zerotuning.search(plan), plan.objective, asdict(plan))


def _act(args: argparse.Namespace, model: ModelIdentity) -> Method:
    if model.layers <= act.FIRST_LAYER:
        raise Unusable(f"act searches layers {act.FIRST_LAYER} and above; there are none")
    plan = act.Plan(
        layers=model.layers,
        heads=model.query_heads,
        probe=args.probe_beta,
        screen=args.screen,
        screen_samples=args.screen_samples,
        grid=args.grid,
        alpha=args.alpha,
    )
    return Method(act.search(plan), ACCURACY, asdict(plan))


def _var(args: argparse.Namespace, channels: Channels) -> Method:
    plan = var.Plan(channels.sink_dims, channels.tau, args.rhos, args.probe_share, args.grid)
    return Method(var.search(plan, channels.remarks), ACCURACY, asdict(plan))


def _gift(args: argparse.Namespace, model: ModelIdentity) -> Method:
    plan = gift.Plan(model.layers, args.probe_alpha, args.grid)
    return Method(gift.search(plan), ACCURACY, asdict(plan))


_PLANNED: Mapping[str, Callable[[argparse.Namespace, ModelIdentity], Method]] = {
    "zerotuning": _zerotuning,
    "act": _act,
    "gift": _gift,
}
