"""A method that observes its prompt, ACT, against its dense equation."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, Literal

import pytest
import torch

from calibrators import reference
from calibrators.act import ACT, ACTSettings
from calibrators.interface import Bound, ColumnMeans, HeadOutputs, ProbabilityBlock, Prompt
from server.engine import step
from tests.server.engine.toy import HEADS, LAYERS, Toy, check, clear_of

EPS = torch.finfo(torch.float32).eps


class SinksSettings(ACTSettings):
    """Requests come bound already."""

    method: Literal["sinks"] = "sinks"


class Sinks(ACT):
    """ACT that raises where it is told to."""

    name: ClassVar = "sinks"
    title: ClassVar = "Sinks"
    Settings: ClassVar = SinksSettings

    def resolve(self, bound, layer, facts, prompt, observed):
        if bound.params.get("raises_in") == layer:
            raise ValueError("in resolve")
        return super().resolve(bound, layer, facts, prompt, observed)


def params(beta=0.4, alpha=1.3, heads=range(HEADS), decode="frozen", **more):
    """All layers but the first."""
    chosen = {"layers": [*range(1, LAYERS)], "heads": [*heads]}
    return {"beta": beta, "alpha": alpha, "threshold": None, "decode": decode} | chosen | more


def act(settings: dict[str, Any], prompt: int, layer: int, p: torch.Tensor) -> torch.Tensor:
    """What `Sinks` means, on the probabilities of a whole sequence."""
    if layer == 0:
        return p
    means = reference.column_means(p[:prompt, :, :prompt])
    clear_of(means, settings["alpha"] / prompt)
    sinks = torch.zeros(p.shape, dtype=torch.bool)
    sinks[..., :prompt] = means > settings["alpha"] / prompt
    if settings["decode"] == "row":
        counts = torch.arange(prompt + 1, len(p) + 1)[:, None, None]
        clear_of(p[prompt:] * counts, settings["alpha"])
        sinks[prompt:] = p[prompt:] * counts > settings["alpha"]
    sinks[..., 0] = False
    changed = reference.act(p, sinks, torch.tensor(settings["beta"], dtype=p.dtype))
    own = torch.isin(torch.arange(HEADS), torch.tensor(settings["heads"]))
    return torch.where(own[:, None], changed, p)


def zerotuning(gamma: float, layer: int, p: torch.Tensor) -> torch.Tensor:
    return reference.zerotuning(p, torch.tensor(gamma, dtype=p.dtype))


PROMPTS = {"a": 70, "b": 33, "p": 40, "z": 50, "c": 20}
LENGTHS = {name: length + 4 for name, length in PROMPTS.items()}
SETTINGS = {
    "a": params(),
    "b": params(0.1, 2.0, heads=[1, 4], decode="row"),
    "c": params(0.0, 1.1, heads=[0, 1, 2, 5]),
}
REWRITES = {name: partial(act, given, PROMPTS[name]) for name, given in SETTINGS.items()}
REWRITES |= {"z": partial(zerotuning, 0.3), "p": lambda layer, p: p}


@pytest.fixture
def table(make_table):
    return make_table(Sinks())


@pytest.fixture
def observing(table, extra_args):
    """Add a request for `Sinks` to the table; gives its state."""

    def make(name, length, settings):
        bound = Bound("sinks", settings, LAYERS - 1, (LAYERS - 1) * len(settings["heads"]))
        table.add(name, extra_args(bound), Prompt(length), 0)
        return table.get(name)

    return make


@pytest.fixture
def toy(table, add, observing):
    """Three requests for `Sinks`, one for ZeroTuning, a plain one."""
    add("z", PROMPTS["z"], gamma=0.3)
    for name, settings in SETTINGS.items():
        observing(name, PROMPTS[name], settings)
    return Toy(table, LENGTHS)


def prefill(toy: Toy, *names: str) -> dict[str, torch.Tensor]:
    return toy.step({name: (0, PROMPTS[name]) for name in names})


def decode(toy: Toy, offset: int, *names: str) -> dict[str, torch.Tensor]:
    starts = {name: PROMPTS[name] + offset for name in names}
    return toy.step({name: (start, start + 1) for name, start in starts.items()})


def test_mixed_batches_over_prompt_and_decoding(toy):
    found = {name: [] for name in PROMPTS}

    def record(step):
        for name, rows in step.items():
            found[name].append(rows)

    record(prefill(toy, "z", "a", "p"))
    # One prompt among decoding rows, of the same method and others.
    starts = {name: (PROMPTS[name], PROMPTS[name] + 1) for name in ("a", "z", "p")}
    record(toy.step({"a": starts["a"], "b": (0, 33), "z": starts["z"], "c": (0, 20)}))
    record(toy.step({"p": starts["p"], "c": (20, 21), "b": (33, 34)}))
    record(decode(toy, 1, "p", "c", "a", "b", "z"))
    record(decode(toy, 2, "c", "b", "z", "a"))
    for name, parts in found.items():
        check(toy, name, REWRITES[name], torch.cat(parts))
    assert not any(toy.table.get(name).failed for name in "abcz")


def test_sinks_are_calibrated_at_all(toy):
    found = prefill(toy, "a")["a"]
    plain = toy.dense("a", REWRITES["p"])[: PROMPTS["a"]]
    assert (found - plain).abs().max() > 0.1


def test_a_prompt_that_comes_again_is_measured_again(toy):
    request = toy.table.get("a")
    first = [prefill(toy, "a", "b")["a"], decode(toy, 0, "a", "b")["a"], decode(toy, 1, "a")["a"]]
    (program,) = request.programs
    tally = (program.tally.count, dict(program.tally.sums), dict(program.tally.layer_sums))
    # Preempted: what it knew of its prompt is not used again.
    program.pools[1:] = [program.pools[0]] * (LAYERS - 1)
    again = toy.step({"a": (0, PROMPTS["a"] + 2), "b": (34, 35)})["a"]
    check(toy, "a", REWRITES["a"], again)
    check(toy, "a", REWRITES["a"], torch.cat(first))
    assert (program.tally.count, program.tally.sums, program.tally.layer_sums) == tally
    check(toy, "a", REWRITES["a"], decode(toy, 2, "a")["a"], PROMPTS["a"] + 2)


def test_an_exception_fails_its_request_alone(toy, observing):
    broken = observing("c", PROMPTS["c"], SETTINGS["c"] | {"raises_in": 2})
    found = prefill(toy, "a", "c", "b", "z")
    assert broken.failed
    assert not any(toy.table.get(name).failed for name in "abz")
    for name in "abz":
        check(toy, name, REWRITES[name], found[name])

    def until_it_raised(layer, p):
        return REWRITES["c"](layer, p) if layer < 2 else p

    check(toy, "c", until_it_raised, found["c"])
    decode(toy, 0, "a", "c", "b", "z")
    assert not broken.programs[0].heads.any()


def test_activations_that_are_not_finite_fail_their_request(toy):
    toy.embeddings["c"][3] = float("nan")
    found = prefill(toy, "a", "c")
    assert (toy.table.get("a").failed, toy.table.get("c").failed) == (False, True)
    check(toy, "a", REWRITES["a"], found["a"])


@pytest.mark.parametrize("cut", [1, 20, 69])
def test_a_prompt_in_pieces_fails(toy, cut):
    toy.step({"a": (0, cut), "b": (0, PROMPTS["b"])})
    assert (toy.table.get("a").failed, toy.table.get("b").failed) == (True, False)
    toy.step({"a": (cut, PROMPTS["a"])})
    assert toy.table.get("a").programs[0].tally.count == 0


def test_tables_are_stacked_once_while_nothing_is_resolved(toy, monkeypatch):
    stacked, of, renew = [], step.Stack.of, step.Stack.renew
    monkeypatch.setattr(step.Stack, "of", lambda *given: stacked.append("all") or of(*given))
    monkeypatch.setattr(
        step.Stack, "renew", lambda self, layer: stacked.append(layer) or renew(self, layer)
    )
    prefill(toy, "a", "b")
    assert stacked == ["all", 1, 2]
    for offset in range(3):
        decode(toy, offset, "a", "b")
    assert stacked == ["all", 1, 2]


def test_statistics_of_plans_are_means_over_layers(toy):
    prefill(toy, "a")
    tally = toy.table.get("a").programs[0].tally
    counts = []

    def counted(layer, p):
        if layer:
            bound = SETTINGS["a"]["alpha"] / PROMPTS["a"]
            means = reference.column_means(p[: PROMPTS["a"], :, : PROMPTS["a"]])
            counts.append((means[:, 1:] > bound).sum().item() / HEADS)
        return REWRITES["a"](layer, p)

    toy.dense("a", counted)
    assert tally.layer_counts == {"sinks": 2}
    assert tally.layer_sums["sinks"] == pytest.approx(sum(counts))
    assert sum(counts) > 0


@pytest.mark.parametrize(
    "observations",
    [
        [ColumnMeans(LAYERS)],
        [ColumnMeans(-1)],
        [ColumnMeans(1, (HEADS,))],
        [ProbabilityBlock(1, (0,), ())],
        [HeadOutputs(1, True)],
    ],
)
def test_what_cannot_be_measured_fails_at_once(make_table, extra_args, observations):
    class Other(Sinks):
        def observe(self, bound, prompt):
            return observations

    table = make_table(Other())
    table.add("a", extra_args(Bound("sinks", params(), 1, 1)), Prompt(5), 0)
    assert table.get("a").failed
