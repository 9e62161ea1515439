"""A method that looks at some rows of one layer to change others, as GIFT does."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import pytest
import torch

from calibrators.interface import (
    Bound,
    Coefficients,
    LayerPlan,
    Pool,
    Prefill,
    ProbabilityBlock,
    Prompt,
    Rows,
    Span,
)
from calibrators.settings import CalibrationSettings
from tests.conftest import FakeCalibrator
from tests.server.engine.toy import HEADS, LAYERS, Toy, check, clear_of

FACTOR = 3.0
SOURCE = 1
KEYS = (Span(2, 10), Span(20, 31))
NOTHING = (Pool(np.empty(0, np.int32)),)


class GazeSettings(CalibrationSettings):
    method: Literal["gaze"] = "gaze"


class Gaze(FakeCalibrator):
    """Turns up, in the last prompt row and all after it, the keys that some rows look at."""

    name: ClassVar = "gaze"
    title: ClassVar = "Gaze"
    Settings: ClassVar = GazeSettings
    pools: ClassVar = ("seen",)
    parameters: ClassVar = ("factor",)

    def prefill(self, bound):
        return Prefill.SPLIT_LAST

    def observe(self, bound, prompt):
        rows = tuple(bound.params["rows"]) if prompt.length else ()
        return [ProbabilityBlock(SOURCE, rows, KEYS)]

    def rows(self, bound, prompt):
        return Rows(first=prompt.length - 1)

    def resolve(self, bound, layer, facts, prompt, observed):
        (block,) = observed.values()
        assert block.shape == (facts.query_heads, len(bound.params["rows"]), 19)
        if bound.params.get("raises_in") == layer:
            raise ValueError("in resolve")
        if not block.shape[1] or layer not in bound.params["in"]:
            return None
        mean = block.mean((0, 1))
        positions = np.concatenate([np.arange(span.start, span.stop) for span in KEYS])
        keys = positions[mean > bound.params["bound"]].astype(np.int32)
        factor = np.full(facts.query_heads, FACTOR, np.float32)
        heads = np.ones(facts.query_heads, np.bool_)
        return LayerPlan(heads, {"factor": factor}, (Pool(keys),), statistics={"seen": len(keys)})

    def coefficients(self, masses, parameters):
        factor, mass = parameters["factor"], masses.plain[..., 0]
        rest = 1 / (1 + (factor - 1) * mass)
        return Coefficients(rest, (factor * rest)[..., None], apply=1 - mass > 1e-6)


PROMPTS = {"a": 70, "b": 45, "p": 40}
SETTINGS = {
    "a": {"rows": [34, 35, 40, 63, 64, 68], "in": [0, 1, 2], "bound": 0.02},
    "b": {"rows": [25, 43], "in": [0], "bound": 0.02},
}


def turned_up(toy, name):
    """What `Gaze` means: rows before the last are plain, and so is what they look at."""
    settings, last = SETTINGS[name], PROMPTS[name] - 1
    inside = torch.cat([torch.arange(span.start, span.stop) for span in KEYS])
    blocks = []

    def record(layer, p):
        if layer == SOURCE:
            blocks.append(p[settings["rows"]][..., inside])
        return p

    toy.dense(name, record)
    mean = blocks[0].mean((0, 1))
    clear_of(mean, settings["bound"])
    keys = inside[mean > settings["bound"]]
    assert 0 < len(keys) < len(inside)

    def rewrite(layer, p):
        if layer not in settings["in"]:
            return p
        pool = torch.isin(torch.arange(p.shape[-1]), keys)
        weighted = torch.where(pool, p * FACTOR, p)
        changed = weighted / weighted.sum(-1, keepdim=True)
        return torch.where(torch.arange(len(p))[:, None, None] >= last, changed, p)

    return rewrite


@pytest.fixture
def table(make_table):
    return make_table(Gaze())


@pytest.fixture
def gazing(table, extra_args):
    def make(name, length, settings):
        bound = Bound("gaze", settings, LAYERS, LAYERS * HEADS)
        table.add(name, extra_args(bound), Prompt(length), 0)
        return table.get(name)

    return make


@pytest.fixture
def toy(table, gazing):
    for name, settings in SETTINGS.items():
        gazing(name, PROMPTS[name], settings)
    return Toy(table, {name: length + 4 for name, length in PROMPTS.items()})


def cuts(length, size):
    """Chunks of a prompt whose last token comes alone."""
    return [(s, min(s + size, length - 1)) for s in range(0, length - 1, size)] + [
        (length - 1, length)
    ]


@pytest.mark.parametrize("size", [69, 64, 35, 10, 1])
def test_a_prompt_in_any_chunks_beside_others(toy, size):
    found, others = [], []
    for index, span in enumerate(cuts(70, size)):
        beside = cuts(45, 44)[index : index + 1]
        spans = {"p": (index, index + 1)} if index < 40 else {}
        spans |= {"b": beside[0]} if beside else {}
        step = toy.step(spans | {"a": span})
        found.append(step["a"])
        others += [step["b"]] if beside else []
    found += [toy.step({"a": (i, i + 1)})["a"] for i in range(70, 74)]
    check(toy, "a", turned_up(toy, "a"), torch.cat(found))
    check(toy, "b", turned_up(toy, "b"), torch.cat(others))
    assert not any(toy.table.get(name).failed for name in "ab")


def test_it_is_calibrated_at_all(toy):
    found = [toy.step({"a": span})["a"] for span in cuts(70, 69)]
    plain = toy.dense("a", lambda layer, p: p)[:70]
    check(toy, "a", lambda layer, p: p, found[0])
    assert (found[1] - plain[69:]).abs().max() > 0.05


def test_a_prompt_that_comes_again(toy):
    first = [toy.step({"a": span})["a"] for span in cuts(70, 20)]
    toy.step({"a": (70, 71)})
    (program,) = toy.table.get("a").programs
    tally = program.tally.count, dict(program.tally.layer_sums)
    # Preempted: in other chunks, its last token with generated ones behind it.
    again = [toy.step({"a": span})["a"] for span in [(0, 50), (50, 69), (69, 72)]]
    check(toy, "a", turned_up(toy, "a"), torch.cat(first))
    check(toy, "a", turned_up(toy, "a"), torch.cat(again))
    assert (program.tally.count - LAYERS * HEADS, program.tally.layer_sums) == tally


def test_a_prompt_that_starts_again_before_it_was_through(toy):
    toy.step({"a": (0, 50)})
    again = [toy.step({"a": span})["a"] for span in cuts(70, 37)]
    check(toy, "a", turned_up(toy, "a"), torch.cat(again))


def test_nothing_is_kept_when_layers_are_resolved(toy):
    tap = toy.table.get("a").programs[0].taps[0]
    toy.step({"a": (0, 69)})
    assert tap._block is not None
    toy.step({"a": (69, 70)})
    assert tap._block is None


@pytest.mark.parametrize(
    "spans", [[(0, 70)], [(0, 60), (60, 70)], [(35, 69), (69, 70)], [(0, 36), (41, 69), (69, 70)]]
)
def test_a_prompt_cut_otherwise_fails(toy, spans):
    toy.pages = [page.nan_to_num(0.1) for page in toy.pages]
    for span in spans:
        toy.step({"a": span, **({"b": (0, 44)} if span is spans[0] else {})})
    assert (toy.table.get("a").failed, toy.table.get("b").failed) == (True, False)
    assert toy.table.get("a").programs[0].tally.count == 0


def test_a_block_of_no_rows(toy, gazing):
    request = gazing("b", 45, {"rows": [], "in": [0], "bound": 0.02})
    found = [toy.step({"b": span})["b"] for span in cuts(45, 44)]
    check(toy, "b", lambda layer, p: p, torch.cat(found))
    assert not request.failed


def test_a_prompt_of_one_token(make_table, extra_args):
    class Empty(Gaze):
        def observe(self, bound, prompt):
            return [ProbabilityBlock(SOURCE, (), ())]

        def resolve(self, bound, layer, facts, prompt, observed):
            (block,) = observed.values()
            assert block.shape == (facts.query_heads, 0, 0)
            return LayerPlan(np.ones(facts.query_heads, np.bool_), {"factor": np.ones(6)}, NOTHING)

    table = make_table(Empty())
    table.add("a", extra_args(Bound("gaze", {}, 1, 1)), Prompt(1), 0)
    toy = Toy(table, {"a": 3})
    check(toy, "a", lambda layer, p: p, toy.step({"a": (0, 1)})["a"])
    request = table.get("a")
    assert not request.failed and request.programs[0].heads.all()


def test_an_exception_fails_its_request_alone(toy, gazing):
    broken = gazing("b", 45, SETTINGS["b"] | {"raises_in": 1})
    found = []
    for span, beside in zip(cuts(70, 69), cuts(45, 44), strict=True):
        found.append(toy.step({"a": span, "b": beside})["a"])
    assert broken.failed and not broken.programs[0].heads.any()
    check(toy, "a", turned_up(toy, "a"), torch.cat(found))


@pytest.mark.parametrize(
    "observation",
    [
        ProbabilityBlock(1, (4,), KEYS),
        ProbabilityBlock(1, (2, 1), ()),
        ProbabilityBlock(1, (1, 1), ()),
        ProbabilityBlock(1, (-1,), ()),
        ProbabilityBlock(1, (3,), (Span(0, 6),)),
        ProbabilityBlock(1, (3,), (Span(-1, 2),)),
        ProbabilityBlock(3, (3,), ()),
    ],
    ids=str,
)
def test_what_is_not_in_the_prompt_fails_at_once(make_table, extra_args, observation):
    class Other(Gaze):
        def observe(self, bound, prompt):
            return [observation]

    table = make_table(Other())
    table.add("a", extra_args(Bound("gaze", SETTINGS["a"], 1, 1)), Prompt(5), 0)
    assert table.get("a").failed


def test_rows_that_come_before_the_block_is_known_fail_at_once(make_table, extra_args):
    class Early(Gaze):
        def rows(self, bound, prompt):
            return Rows(first=prompt.length - 2)

    table = make_table(Early())
    table.add("a", extra_args(Bound("gaze", SETTINGS["a"], 1, 1)), Prompt(70), 0)
    assert table.get("a").failed
