"""A method that scales the heads whose output stands out, as VHR does."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import pytest
import torch

from calibrators import reference
from calibrators.interface import (
    Bound,
    Coefficients,
    HeadOutputs,
    LayerPlan,
    Prefill,
    Prompt,
    Rows,
)
from calibrators.settings import CalibrationSettings
from tests.conftest import FakeCalibrator
from tests.server.engine.toy import HEADS, Toy, check

ALPHA = 1.7


class LoudSettings(CalibrationSettings):
    method: Literal["loud"] = "loud"


class Loud(FakeCalibrator):
    """Scales heads whose output at the last prompt row is longer than the median, in two layers."""

    name: ClassVar = "loud"
    title: ClassVar = "Loud"
    Settings: ClassVar = LoudSettings
    causal: ClassVar = False
    reweights: ClassVar = False
    parameters: ClassVar = ("alpha",)

    def prefill(self, bound):
        return Prefill(bound.params["prefill"])

    def observe(self, bound, prompt):
        return [HeadOutputs(layer) for layer in (0, 2)]

    def rows(self, bound, prompt):
        return Rows(first=0 if bound.params["prefill"] == "whole" else prompt.length - 1)

    def resolve(self, bound, layer, facts, prompt, observed):
        if not observed:
            return None
        outputs = observed[HeadOutputs(layer)]
        assert outputs.shape == (facts.query_heads, facts.head_dim)
        size = np.linalg.norm(outputs, axis=1)
        alpha = np.full(facts.query_heads, ALPHA, np.float32)
        return LayerPlan(size > np.sort(size)[len(size) // 2 - 1], {"alpha": alpha})

    def coefficients(self, masses, parameters):
        alpha = parameters["alpha"]
        return Coefficients(
            torch.ones_like(alpha), scale=alpha, statistics={"alpha": torch.ones_like(alpha)}
        )


PROMPTS = {"a": 70, "b": 33, "p": 40, "z": 50}


def loud(toy, name, weigh=None, first=0):
    """What `Loud` means after `weigh`, a calibration of weights."""
    last = PROMPTS[name] - 1

    def rewrite(layer, p):
        p = weigh(layer, p) if weigh else p
        if layer == 1:
            return p
        size = reference.attend(p[last:][:1], toy.value).norm(dim=-1)[0]
        ordered = size.sort().values
        middle = HEADS // 2
        assert ordered[middle] - ordered[middle - 1] > 1e-4 * ordered[middle]
        scale = torch.where(size > ordered[middle - 1], ALPHA, 1.0).to(p)
        rows = torch.arange(len(p))[:, None, None] >= first
        return torch.where(rows, p * scale[:, None], p)

    return rewrite


def zerotuning(layer, p):
    return reference.zerotuning(p, torch.tensor(0.3, dtype=p.dtype))


@pytest.fixture
def table(make_table):
    return make_table(Loud())


@pytest.fixture
def asking(table, extra_args, add):
    def make(name, prefill, *, weigh=False, cached=0):
        bounds = [Bound("loud", {"prefill": prefill}, 2, 2 * HEADS)]
        if weigh:
            bounds.append(
                Bound("zerotuning", {"gamma": 0.3, "layers": "all", "heads": "all"}, 3, 18)
            )
        table.add(name, extra_args(*bounds), Prompt(PROMPTS[name]), cached)
        return table.get(name)

    return make


@pytest.fixture
def toy(table):
    return Toy(table, {name: length + 4 for name, length in PROMPTS.items()})


def decode(toy, name):
    start = PROMPTS[name]
    return [toy.step({name: (i, i + 1)})[name] for i in range(start, start + 4)]


@pytest.mark.parametrize("weigh", [False, True])
def test_whole_prompts_beside_others(toy, asking, add, weigh):
    asking("a", "whole", weigh=weigh)
    asking("b", "whole")
    add("z", PROMPTS["z"], gamma=0.3)
    step = toy.step({"p": (0, 10), "a": (0, 70), "z": (0, 50), "b": (0, 33)})
    check(
        toy,
        "a",
        loud(toy, "a", zerotuning if weigh else None),
        torch.cat([step["a"], *decode(toy, "a")]),
    )
    check(toy, "b", loud(toy, "b"), torch.cat([step["b"], *decode(toy, "b")]))
    check(toy, "z", zerotuning, step["z"])
    assert not any(toy.table.get(name).failed for name in "abz")


@pytest.mark.parametrize("weigh", [False, True])
def test_the_last_row_alone(toy, asking, weigh):
    asking("a", "split_last", weigh=weigh)
    found = [toy.step({"a": span})["a"] for span in [(0, 30), (30, 69), (69, 70)]]
    rewrite = loud(toy, "a", zerotuning if weigh else None, first=69)
    check(toy, "a", rewrite, torch.cat([*found, *decode(toy, "a")]))


@pytest.mark.parametrize("prefill", ["whole", "split_last"])
def test_a_prompt_that_comes_again(toy, asking, prefill):
    request = asking("a", prefill, weigh=True)
    spans = {"whole": [(0, 70)], "split_last": [(0, 69), (69, 70)]}[prefill]
    again = {"whole": [(0, 72)], "split_last": [(0, 40), (40, 69), (69, 72)]}[prefill]
    rewrite = loud(toy, "a", zerotuning, first=69 if prefill == "split_last" else 0)
    for each in (spans, again):
        check(toy, "a", rewrite, torch.cat([toy.step({"a": span})["a"] for span in each]))
    assert not request.failed


def test_tallies_of_a_method_without_pools(toy, asking):
    (program,) = asking("a", "whole").programs
    toy.step({"a": (0, 70)})
    assert (program.tally.prompt_tokens, program.tally.completion_tokens) == (70, 0)
    assert program.tally.count == program.tally.sums["alpha"] == 70 * 2 * HEADS // 2
    decode(toy, "a")
    assert program.tally.completion_tokens == 4


def test_a_prompt_in_pieces_fails(toy, asking):
    asking("a", "whole")
    toy.step({"a": (0, 40)})
    assert toy.table.get("a").failed


def test_outputs_that_are_not_finite_fail_their_request(toy, asking):
    asking("a", "whole")
    asking("b", "whole")
    toy.embeddings["b"][2] = float("inf")
    step = toy.step({"a": (0, 70), "b": (0, 33)})
    assert (toy.table.get("a").failed, toy.table.get("b").failed) == (False, True)
    check(toy, "a", loud(toy, "a"), step["a"])
