"""Factories shared by many tests: a small model's facts and calibrators that need no engine."""

from __future__ import annotations

import os
from typing import Annotated, ClassVar, Literal

import pytest
import torch
from hypothesis import settings
from pydantic import Field

from calibrators.interface import Bound, Coefficients, ModelFacts, Prefill, Rows
from calibrators.profiles import Profile
from calibrators.settings import CalibrationSettings

# A first call pays for imports and compilation, and a busy machine for its neighbours. Examples are
# new in every run but those of CI, which judges a change and not a draw.
settings.register_profile("trimtab", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("trimtab")

# Beside another test process and an engine, threads of one product wait for each other's turn: a
# forward pass of half a second took ten.
torch.set_num_threads(1)


def pytest_itemcollected(item):
    """With several test processes, engines are left to one of them: never two side by side.

    Here and not once all are collected: by then pytest-xdist has read the groups.
    """
    if "tests/integration/" in item.nodeid or item.get_closest_marker("engine"):
        item.add_marker(pytest.mark.engine)
        item.add_marker(pytest.mark.xdist_group("engine"))


CONFIG_HASH = "c0" * 32


@pytest.fixture(scope="session")
def make_facts():
    """Facts of a small model, any of them overridden."""

    def make(**changes):
        usual = {
            "architecture": "LlamaForCausalLM",
            "layers": 4,
            "query_heads": 6,
            "kv_heads": 2,
            "head_dim": 32,
            "hidden_size": 192,
            "max_model_len": 512,
            "config_hash": CONFIG_HASH,
        }
        return ModelFacts(**(usual | changes))

    return make


@pytest.fixture(scope="session")
def profile_content():
    """Content of a profile's file for the model of `make_facts`, any field overridden."""

    def make(**changes):
        usual = {
            "format": 1,
            "name": "calm",
            "model": {
                "config_hash": CONFIG_HASH,
                "architecture": "LlamaForCausalLM",
                "layers": 4,
                "query_heads": 6,
            },
            "method": "zerotuning",
            "parameters": {"gamma": 0.5, "layers": [1, 3], "heads": [0, 2]},
            "provenance": {
                "data": {"name": "reviews", "sha256": "d1" * 32},
                "split": {"seed": 0, "search": 500, "report": 372},
                "metric": "accuracy",
                "baseline": {"value": 0.62, "low": 0.57, "high": 0.67},
                "result": {"value": 0.71, "low": 0.66, "high": 0.76},
                "confidence": 0.95,
                "date": "2026-11-25",
                "trimtab": "0.1.0",
                "search": {"grid": [0.3, 0.5], "heads": "probed one by one"},
            },
        }
        return usual | changes

    return make


@pytest.fixture(scope="session")
def make_profile(profile_content):
    """A profile with that content."""

    def make(**changes):
        return Profile.model_validate(profile_content(**changes))

    return make


@pytest.fixture(scope="session")
def make_calibrator():
    """An instance of a calibrator class made on the spot, any class attribute overridden."""

    def make(name="scale", **attributes):
        settings = type(
            "Settings",
            (CalibrationSettings,),
            {
                "__annotations__": {
                    "method": Literal[name],
                    "strength": Annotated[float, Field(ge=0, le=4)],
                },
                "__module__": __name__,
                "method": name,
                "strength": 1.0,
            },
        )
        usual = {"name": name, "title": name.title(), "Settings": settings}
        return type("Fake", (FakeCalibrator,), usual | attributes)()

    return make


class FakeCalibrator:
    """Scales nothing and keeps the contract; meant to be subclassed."""

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str] = "https://example.org/paper"
    modality: ClassVar[str] = "text"
    causal: ClassVar[bool] = True
    touches_prompt_kv: ClassVar[bool] = True
    reweights: ClassVar[bool] = True
    revision: ClassVar[int] = 1
    pools: ClassVar[tuple[str, ...]] = ()
    parameters: ClassVar[tuple[str, ...]] = ()
    rescales: ClassVar[str | None] = None
    Settings: ClassVar[type[CalibrationSettings]]

    def bind(self, settings, facts):
        params = settings.model_dump(exclude={"method"})
        return Bound(self.name, params, facts.layers, facts.layers * facts.query_heads)

    def prefill(self, bound):
        return Prefill.ANY

    def observe(self, bound, prompt):
        return ()

    def rows(self, bound, prompt):
        return Rows()

    def resolve(self, bound, layer, facts, prompt, observed):
        return None

    def coefficients(self, masses, parameters):
        return Coefficients(rest=1 - 0 * masses.plain.sum(-1))
