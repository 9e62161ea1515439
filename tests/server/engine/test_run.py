"""Steps that use one plan again do what each would do with a plan of its own."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from calibrators.interface import Coefficients, LayerPlan
from server.engine import answers, rewrites
from server.engine.context import StepContext
from server.engine.payload import Report
from server.engine.progress import Progress, report_of, seconds_of
from tests.server.kernels.paging import problem, stock

LAYERS = 3


@pytest.fixture(params=["closed form", "coefficients"])
def way(request, monkeypatch):
    """ZeroTuning both ways."""
    if request.param == "coefficients":
        monkeypatch.setattr(rewrites, "_rescales", lambda method: False)


class Worker:
    """A worker's context, and the scheduler's view of what it reports.

    Args:
        repeats: whether plans may be used again.
    """

    def __init__(self, table, *, repeats):
        self.batch: list[str] = []
        self.context = StepContext(table, lambda _: self.batch)
        self.context._repeats = repeats
        self.reports: dict[str, Report] = {}
        self.kinds: list[type] = []
        self.computed: list[frozenset[int]] = []

    def step(self, names, lengths, spans=None, new=(), finished=(), change=None):
        """Run a step; its outputs by layer, and the tallies it reports."""
        spans = spans or [1] * len(names)
        self.context.begin(
            SimpleNamespace(
                finished_req_ids=set(finished),
                preempted_req_ids=None,
                scheduled_new_reqs=list(new),
                num_scheduled_tokens=dict(zip(names, spans, strict=True)),
            )
        )
        self.batch[:] = names
        start = torch.tensor([0, *spans]).cumsum(0)
        metadata = SimpleNamespace(
            num_reqs=len(spans), query_start_loc_cpu=start, seq_lens=torch.tensor(lengths)
        )
        plan = self.context.plan(metadata)
        case = problem(lengths, spans, seed=sum(lengths))
        outputs = []
        for layer in range(LAYERS):
            if change is not None:
                change(case, layer)
            output, computed = stock(case).float(), plan.computed(layer)
            for row in computed:
                output[start[row] : start[row + 1]] = float("nan")
            self.computed.append(computed)
            plan.apply(layer, case.query, output, case.cache, case.geometry)
            outputs.append(output)
        return outputs, self.tallies(self.context.finish())

    def tallies(self, reports):
        self.kinds.append(type(reports))
        if not isinstance(reports, Progress):
            self.reports = reports
        assert min(seconds_of(reports).values()) > 0
        names = [name for name in self.batch if report_of(name, reports, self.reports) is not None]
        assert names == [name for name in self.batch if self.context._table.get(name) is not None]
        return {
            name: [
                (t.prompt_tokens, t.completion_tokens, t.count, {**t.sums})
                for t in report_of(name, reports, self.reports).tallies
            ]
            for name in names
        }


@pytest.fixture
def scaling(make_calibrator):
    """Doubles head 2 everywhere; a method without pools."""

    def resolve(self, bound, layer, facts, prompt, observed):
        heads = np.arange(facts.query_heads) == 2
        return LayerPlan(heads, {"scale": np.full(facts.query_heads, 2, np.float32)})

    def coefficients(self, masses, parameters):
        scale = parameters["scale"]
        return Coefficients(torch.ones_like(scale), scale=scale, statistics={"scale": scale})

    return make_calibrator(
        "double",
        reweights=False,
        parameters=("scale",),
        resolve=resolve,
        coefficients=coefficients,
    )


@pytest.fixture
def pair(make_table, extra_args, facts, bound, scaling):
    """Two workers, of which one uses plans again, and a maker of new requests."""
    doubling = scaling.bind(scaling.Settings(), facts)

    def new(name, length, plain=False, both=False, **settings):
        bounds = [] if settings else [bound, doubling] if both else [bound]
        arguments = extra_args(*bounds, ticket=f"t-{name}", **settings)
        return SimpleNamespace(
            req_id=name,
            sampling_params=SimpleNamespace(extra_args=None if plain else arguments),
            prompt_token_ids=[0] * length,
            prompt_embeds=None,
            num_computed_tokens=0,
        )

    one, other = (Worker(make_table(scaling), repeats=repeats) for repeats in (True, False))
    return one, other, new


def same(pair, *args, **kwargs):
    (outputs, tallies), (expected, counted) = (w.step(*args, **kwargs) for w in pair[:2])
    torch.testing.assert_close(outputs, expected)
    assert {name: len(own) for name, own in tallies.items()} == {
        name: len(own) for name, own in counted.items()
    }
    for name, own in tallies.items():
        for (*numbers, sums), (*wanted, totals) in zip(own, counted[name], strict=True):
            assert numbers == wanted
            assert sums == pytest.approx(totals)
    return tallies


def test_reports_and_outputs_are_those_of_steps_of_their_own(way, pair):
    one, _, new = pair
    prompts = [new("a", 20), new("b", 9, both=True)]
    same(pair, ["a", "b"], [20, 9], [20, 9], prompts)
    for n in range(1, 8):
        tallies = same(pair, ["a", "b"], [20 + n, 9 + n])
    assert [tally[1] for tally in tallies["b"]] == [7, 7]
    # The first token's step is reported by itself.
    assert one.kinds == [dict, dict, *[Progress] * 6]


def test_a_run_goes_on_over_the_ends_of_pages(way, pair):
    _, _, new = pair
    same(pair, ["a", "b"], [29, 60], [29, 60], [new("a", 29), new("b", 60)])
    for n in range(1, 9):
        same(pair, ["a", "b"], [29 + n, 60 + n])


def test_a_batch_that_changes_ends_a_run_and_another_begins(way, pair):
    one, _, new = pair
    same(pair, ["a", "b"], [20, 9], [20, 9], [new("a", 20), new("b", 9)])
    for n in (1, 2, 3):
        same(pair, ["a", "b"], [20 + n, 9 + n])
    same(pair, ["b", "a"], [13, 24])
    same(pair, ["b", "a"], [14, 25])
    same(pair, ["b", "a", "c"], [15, 26, 5], [1, 1, 5], [new("c", 5)])
    same(pair, ["b", "a", "c"], [16, 27, 6])
    same(pair, ["b", "a", "c"], [17, 28, 7])
    tallies = same(pair, ["a", "c"], [29, 8], finished=["b"])
    assert tallies["a"][0][1] == 9
    assert one.kinds.count(Progress) == 4


def test_a_request_that_waits_or_starts_again_is_counted_once(way, pair):
    _, _, new = pair
    same(pair, ["a", "b"], [20, 9], [20, 9], [new("a", 20), new("b", 9)])
    for n in (1, 2, 3):
        same(pair, ["a", "b"], [20 + n, 9 + n])
    for n in (4, 5):
        same(pair, ["b"], [9 + n])
    # Preempted: everything of it is computed again.
    same(pair, ["b", "a"], [15, 23], [1, 23])
    tallies = same(pair, ["b", "a"], [16, 24])
    assert tallies["a"][0][1] == 4
    assert same(pair, ["b", "a"], [17, 25])["b"][0][1] == 8


@pytest.fixture
def by_coefficients(monkeypatch):
    """ZeroTuning as methods without a closed form."""
    monkeypatch.setattr(rewrites, "_rescales", lambda method: False)


def test_what_a_run_has_changed_it_computes(by_coefficients, pair):
    """From the third step on: what the first two are like is not known to come again."""
    one, other, new = pair
    prompts = [new("a", 20, gamma=0.3), new("p", 9, plain=True)]
    same(pair, ["a", "p"], [20, 9], [20, 9], prompts)
    for n in range(1, 6):
        same(pair, ["a", "p"], [20 + n, 9 + n])
    assert set(one.computed[: 3 * LAYERS]) == {frozenset()}
    assert set(one.computed[3 * LAYERS :]) == {frozenset([0])}
    same(pair, ["p", "a"], [15, 26])
    assert set(one.computed[-LAYERS:]) == {frozenset()} == set(other.computed)


@pytest.mark.parametrize("settings", [{"gamma": 1}, {"heads": [0, 2, 3, 4, 5]}], ids=str)
def test_what_may_keep_every_bit_is_not_computed(by_coefficients, pair, settings):
    one, _, new = pair
    one.step(["a"], [20], [20], [new("a", 20, **settings)])
    for n in range(1, 6):
        one.step(["a"], [20 + n])
    assert set(one.computed) == {frozenset()}


def test_without_pools_nothing_is_computed(monkeypatch, scaling, facts, extra_args, make_table):
    """A method that looks across heads goes the general way all the same."""
    monkeypatch.setattr(type(scaling), "across_heads", True, raising=False)

    def everywhere(self, bound, layer, facts, prompt, observed):
        heads = np.ones(facts.query_heads, np.bool_)
        return LayerPlan(heads, {"scale": np.full(facts.query_heads, 2, np.float32)})

    monkeypatch.setattr(type(scaling), "resolve", everywhere)
    arguments = extra_args(scaling.bind(scaling.Settings(), facts))
    new = SimpleNamespace(
        req_id="a",
        sampling_params=SimpleNamespace(extra_args=arguments),
        prompt_token_ids=[0] * 20,
        prompt_embeds=None,
        num_computed_tokens=0,
    )
    worker = Worker(make_table(scaling), repeats=True)
    worker.step(["a"], [20], [20], [new])
    for n in range(1, 5):
        outputs, _ = worker.step(["a"], [20 + n])
    assert set(worker.computed) == {frozenset()}
    twice = 2 * stock(problem([24], [1], seed=24)).float()
    torch.testing.assert_close(outputs, [twice] * LAYERS)


def test_a_calibrator_that_raises_leaves_plain_attention(by_coefficients, pair, monkeypatch):
    one, _, new = pair
    one.step(["a"], [20], [20], [new("a", 20, gamma=0.3)])
    for n in range(1, 4):
        one.step(["a"], [20 + n])

    def raising(*_):
        raise ValueError("in coefficients")

    monkeypatch.setattr(answers.Answers, "ask", raising)
    outputs, _ = one.step(["a"], [24])
    assert one.computed[-1] == {0}
    plain = stock(problem([24], [1], seed=24)).float()
    torch.testing.assert_close(outputs, [plain] * LAYERS)
    assert one.reports["a"].failed


def test_plain_neighbours_may_do_what_they_like(way, pair):
    one, _, new = pair
    same(pair, ["p", "a"], [4, 20], [4, 20], [new("p", 4, plain=True), new("a", 20)])
    for n, span in enumerate((1, 3, 1, 2), 1):
        same(pair, ["p", "a"], [4 + 3 * n, 20 + n], [span, 1])
    assert one.kinds == [dict, dict, Progress, Progress, Progress]


def test_a_result_that_is_not_finite_ends_the_run_and_fails_its_request(pair):
    one, other, new = pair
    for worker in (one, other):
        worker.step(["a", "b"], [20, 9], [20, 9], [new("a", 20), new("b", 9)])
        for n in (1, 2, 3):
            worker.step(["a", "b"], [20 + n, 9 + n])

        def spoil(case, layer):
            if layer == 1:
                case.query[0, 2] = float("nan")

        worker.step(["a", "b"], [24, 13], change=spoil)
    assert one.kinds == [dict, dict, Progress, Progress, dict]
    for worker in (one, other):
        assert [worker.reports[name].failed for name in "ab"] == [True, False]
    for worker in (one, other):
        tally = worker.reports["b"].tallies[0]
        assert (tally.completion_tokens, tally.count) == (4, 9 + 4)


def test_a_report_that_nothing_went_before_is_left_out():
    assert Progress(("a",), (), {"zerotuning": 0.1}).since("a", {}) is None
