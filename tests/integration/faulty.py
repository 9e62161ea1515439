"""A calibrator that computes nonsense, as an installed distribution."""

from __future__ import annotations

from pathlib import Path

from tests.integration import plugins

FAULTY = """
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from calibrators.zerotuning import ZeroTuning, ZeroTuningSettings


class FaultySettings(ZeroTuningSettings):
    method: Literal["faulty"] = "faulty"


class Faulty(ZeroTuning):
    name: ClassVar[str] = "faulty"
    title: ClassVar[str] = "Faulty"
    Settings: ClassVar[type] = FaultySettings

    def coefficients(self, masses, parameters):
        if (parameters["gamma"] == 99).any():
            raise RuntimeError("on purpose")
        result = super().coefficients(masses, parameters)
        # Goes wrong for long contexts only: the first tokens come out well.
        result.rest[masses.plain[..., 0] < 0.2] = float("nan")
        return result
"""


def install(folder: Path) -> dict[str, str]:
    """Put the distribution into `folder`; the environment in which it is found."""
    entry_points = "[trimtab.calibrators]\nfaulty = faulty:Faulty\n"
    return plugins.install(folder, "faulty", FAULTY, entry_points)
