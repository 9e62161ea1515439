"""A method that follows the residual stream: in effect VAR's sinks, against a dense equation."""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch

from calibrators import reference
from calibrators.interface import (
    Bound,
    Coefficients,
    LayerPlan,
    Pool,
    Prompt,
    ResidualPeaks,
)
from calibrators.settings import CalibrationSettings
from server.engine.batch import Member
from server.engine.taps.peaks import PeakTable, PeakTap
from server.engine.taps.tap import View
from server.kernels.partials import AttentionGeometry, PagedCache
from tests.conftest import FakeCalibrator
from tests.server.engine.toy import BLOCK, HEADS, LAYERS, Toy, check, clear_of

CHANNELS = {0: (3,), 1: (5, 70), 2: (191, 8, 40)}
TAU = 1.2
BETA = 0.3


class PeakySettings(CalibrationSettings):
    method: Literal["peaky"] = "peaky"


class Peaky(FakeCalibrator):
    """Turns down keys whose token stands out, in all rows that see some."""

    name: ClassVar = "peaky"
    title: ClassVar = "Peaky"
    Settings: ClassVar = PeakySettings
    pools: ClassVar = ("peaks",)
    parameters: ClassVar = ("beta",)

    def observe(self, bound, prompt):
        return [ResidualPeaks(layer, CHANNELS[layer]) for layer in bound.params["in"]]

    def resolve(self, bound, layer, facts, prompt, observed):
        if not observed:
            return None
        (found,) = observed.values()
        assert found.shape == (prompt.length,) and found.dtype == np.float32
        keys = np.flatnonzero(found > TAU).astype(np.int32)
        heads = np.ones(facts.query_heads, np.bool_)
        beta = np.full(facts.query_heads, BETA, np.float32)
        statistics = {"peaks": float(len(keys))}
        return LayerPlan(heads, {"beta": beta}, (Pool(keys),), statistics=statistics)

    def coefficients(self, masses, parameters):
        beta, mass = parameters["beta"], masses.plain[..., 0]
        rest = (1 - beta * mass) / (1 - mass).clamp_min(1e-6)
        return Coefficients(rest, beta[..., None], apply=(mass > 0) & (1 - mass >= 1e-6))


def dense_peaks(layer, stream):
    return reference.residual_peaks(stream, torch.tensor(CHANNELS[layer]))


def turned_down(toy, prompt, layers, layer, p):
    if layer not in layers:
        return p
    found = dense_peaks(layer, toy.hidden[:prompt])
    clear_of(found, TAU)
    sinks = torch.zeros(p.shape[-1], dtype=torch.bool)
    sinks[:prompt] = found > TAU
    return reference.act(p, sinks, torch.tensor(BETA, dtype=p.dtype))


PROMPTS = {"a": 70, "b": 33, "p": 40, "c": 90}
ALL = [0, 1, 2]


@pytest.fixture
def table(make_table):
    return make_table(Peaky())


@pytest.fixture
def following(table, extra_args):
    def make(name, length, layers=ALL, cached=0):
        bound = Bound("peaky", {"in": layers}, LAYERS, LAYERS * HEADS)
        table.add(name, extra_args(bound), Prompt(length), cached)
        return table.get(name)

    return make


@pytest.fixture
def toy(table, following):
    toy = Toy(table, {name: length + 4 for name, length in PROMPTS.items()})
    following("a", PROMPTS["a"])
    following("b", PROMPTS["b"], [1])
    return toy


def rewrite(toy, name, layers=ALL):
    return partial(turned_down, toy, PROMPTS[name], layers)


@pytest.mark.parametrize("cut", [70, 64, 32, 17, 1])
def test_a_prompt_in_any_chunks_beside_others(toy, cut):
    found, other = [], []
    for index, start in enumerate(range(0, 70, cut)):
        spans = {"p": (index, index + 1)} if index < 40 else {}
        if start == 0:
            spans["b"] = (0, 33)
        spans["a"] = (start, min(start + cut, 70))
        step = toy.step(spans)
        found.append(step["a"])
        other += [step["b"]] if start == 0 else []
    for i in range(70, 74):
        found.append(toy.step({"a": (i, i + 1)})["a"])
    check(toy, "a", rewrite(toy, "a"), torch.cat(found))
    check(toy, "b", rewrite(toy, "b", [1]), other[0])
    assert not toy.table.get("a").failed


def test_it_is_calibrated_at_all(toy):
    plain = toy.dense("a", lambda layer, p: p)[:70]
    assert (toy.step({"a": (0, 70)})["a"] - plain).abs().max() > 0.1


def test_statistics_are_those_of_the_whole_prompt(toy):
    for start in range(0, 70, 16):
        toy.step({"a": (start, min(start + 16, 70))})
    counts = []

    def counted(layer, p):
        counts.append((dense_peaks(layer, toy.hidden[:70]) > TAU).sum().item())
        return rewrite(toy, "a")(layer, p)

    toy.dense("a", counted)
    tally = toy.table.get("a").programs[0].tally
    assert (tally.layer_sums["peaks"], tally.layer_counts["peaks"]) == (sum(counts), LAYERS)


def share(toy, name, other, tokens):
    """Give `other` the first blocks of `name`, as a hit in the prefix cache does."""
    toy.embeddings[other][:tokens] = toy.embeddings[name][:tokens]
    toy.tables[other][: tokens // BLOCK] = toy.tables[name][: tokens // BLOCK]


def test_peaks_of_cached_tokens_are_there(toy, following):
    share(toy, "a", "c", 64)
    toy.step({"a": (0, 30)})
    toy.step({"a": (30, 70), "p": (0, 40)})
    toy.table.drop(["a"])
    following("c", PROMPTS["c"], cached=64)
    found = [toy.step({"c": (64, 80)})["c"], toy.step({"c": (80, 90)})["c"]]
    check(toy, "c", rewrite(toy, "c"), torch.cat(found), 64)


@pytest.mark.parametrize("order", ["ca", "ac"])
def test_blocks_that_a_neighbour_computes_in_the_same_step(toy, following, order):
    share(toy, "a", "c", 64)
    following("c", PROMPTS["c"], cached=64)
    spans = {"a": (0, 70), "c": (64, 90)}
    found = toy.step({name: spans[name] for name in order})
    check(toy, "a", rewrite(toy, "a"), found["a"])
    check(toy, "c", rewrite(toy, "c"), found["c"], 64)


def test_blocks_that_are_used_again_for_other_tokens(toy, following):
    toy.step({"a": (0, 70)})
    toy.table.drop(["a"])
    toy.tables["c"][:] = toy.tables["a"]
    following("c", PROMPTS["c"])
    found = torch.cat([toy.step({"c": (s, s + 45)})["c"] for s in (0, 45)])
    check(toy, "c", rewrite(toy, "c"), found)


def test_a_prompt_that_comes_again_in_other_chunks(toy):
    first = torch.cat([toy.step({"a": (s, min(s + 20, 70))})["a"] for s in range(0, 70, 20)])
    toy.step({"a": (70, 71)})
    check(toy, "a", rewrite(toy, "a"), first)
    # Preempted; part of it is found in the cache, and its end comes with generated tokens.
    again = torch.cat([toy.step({"a": span})["a"] for span in ((32, 50), (50, 72))])
    check(toy, "a", rewrite(toy, "a"), again, 32)
    assert not toy.table.get("a").failed


def test_rows_that_are_not_finite_fail_their_request(toy):
    toy.embeddings["a"][3] = float("nan")
    toy.step({"a": (0, 30), "b": (0, 33)})
    assert (toy.table.get("a").failed, toy.table.get("b").failed) == (True, False)


def test_a_stream_that_nobody_shows_fails_the_request(toy, monkeypatch):
    monkeypatch.setattr("server.engine.step.StepPlan.followed", lambda plan: set())
    toy.step({"a": (0, 30)})
    assert toy.table.get("a").failed


def test_nothing_is_followed_without_a_prompt(toy):
    seen = []
    following = toy.planner.plan

    def plan(batch):
        made = following(batch)
        seen.append(made.followed())
        return made

    toy.planner.plan = plan
    toy.step({"b": (0, 33)})
    toy.step({"b": (33, 34)})
    assert seen == [{1}, set()]


@pytest.mark.parametrize("channels", [(), (0, 192), (-1,)])
def test_channels_the_model_has_not_got_fail_at_once(make_table, extra_args, channels):
    class Other(Peaky):
        def observe(self, bound, prompt):
            return [ResidualPeaks(0, channels)]

    table = make_table(Other())
    table.add("a", extra_args(Bound("peaky", {}, 1, 1)), Prompt(5), 0)
    assert table.get("a").failed


def test_rows_of_the_table_keep_apart():
    table = PeakTable()
    first = table.row(("a", 0), 8)
    first[3] = 1
    assert table.row(("a", 0), 8) is first
    assert not table.row(("a", 1), 8).any() and not table.row(("b", 0), 8).any()


@pytest.mark.parametrize(("window", "hidden"), [(0, 0), (20, 21), (40, 1), (41, 0), (64, 0)])
def test_positions_that_a_window_hides_from_all_rows_read_zero(window, hidden):
    stream = torch.randn(50, 8)
    tap = PeakTap(ResidualPeaks(0, (2,)), 60, PeakTable(), ("peaky", 0))
    none = torch.empty(0)
    cache = PagedCache(torch.empty(3, 1, 2, 8 * 32), torch.tensor([[2, 0]], dtype=torch.int32))
    query = torch.empty(10, 1, 8)
    view = View(query, query, cache, AttentionGeometry(1.0, 0.0, window, none, none))
    for start, stop in ((0, 40), (40, 50)):
        member = Member(None, 0, 0, start, stop)
        tap.enter(member, stream[start:stop], None)
        PeakTap.take([(member, tap)], view)
        found = tap.value()
    expected = reference.residual_peaks(stream, torch.tensor([2])).numpy()
    assert found.shape == (60,) and not found[50:].any() and not found[:hidden].any()
    assert np.allclose(found[hidden:50], expected[hidden:], rtol=1e-6)
