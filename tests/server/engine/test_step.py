"""A step over a toy paged cache, against the dense reference."""

import numpy as np
import pytest
import torch

from calibrators import reference
from calibrators.interface import Coefficients, LayerPlan, Prompt, Span
from calibrators.interface import Rows as CalibratedRows
from server.engine import rewrites, step
from server.engine.batch import members
from server.engine.step import Planner
from tests.server.kernels.paging import problem

TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}


class Step:
    """One batch of `spans` last rows of `lengths` tokens, with what every layer needs."""

    def __init__(self, table, names, lengths, spans, **geometry):
        self.table, self.names = table, names
        self.case = problem(lengths, spans, **geometry)
        self.starts = np.cumsum([0, *spans]).tolist()
        self.lengths = lengths

    def plan(self, planner=None):
        batch = members(self.table, self.names, self.starts, self.lengths)
        return (planner or Planner()).plan(batch)

    def stock(self):
        parts = [
            reference.attend(self.case.dense(i)[0], value.double())
            for i, value in enumerate(self.case.values)
        ]
        return torch.cat(parts)

    def apply(self, plan, layer, output):
        plan.apply(layer, self.case.query, output, self.case.cache, self.case.geometry)
        return output

    def expected(self, gammas):
        """Outputs where request `i` has `gammas[i]` `[heads]`."""
        parts = []
        for i, value in enumerate(self.case.values):
            p, _ = self.case.dense(i)
            changed = reference.zerotuning(p, torch.as_tensor(gammas[i]).double())
            parts.append(reference.attend(changed, value.double()))
        return torch.cat(parts)

    def rows(self, i):
        return slice(self.starts[i], self.starts[i + 1])


@pytest.fixture(params=["closed form", "coefficients"], autouse=True)
def way(request, monkeypatch):
    """ZeroTuning both ways."""
    if request.param == "coefficients":
        monkeypatch.setattr(rewrites, "_rescales", lambda method: False)


@pytest.fixture
def make_step(table):
    def make(names, lengths, spans, **geometry):
        return Step(table, names, lengths, spans, **geometry)

    return make


def test_each_request_gets_its_own_calibration(add, make_step):
    add("a", 40, gamma=0.3)
    add("p", 30, plain=True)
    add("b", 20, gamma=5, heads=[0, 4], layers=[1])
    run = make_step(["a", "p", "b"], [40, 30, 25], [40, 30, 1])
    plan = run.plan()
    stock = run.stock().float()
    everywhere, some = [0.3] * 6, [5, 1, 1, 1, 5, 1]
    for layer, of_b in ((0, [1] * 6), (1, some), (2, [1] * 6)):
        output = run.apply(plan, layer, stock.clone())
        expected = run.expected([everywhere, [1] * 6, of_b])
        torch.testing.assert_close(output.double(), expected, **TOLERANCE)
        assert torch.equal(output[run.rows(1)], stock[run.rows(1)])
        untouched = [head for head in range(6) if of_b[head] == 1 and 2 not in plan.computed(layer)]
        assert torch.equal(output[run.rows(2)][:, untouched], stock[run.rows(2)][:, untouched])


def test_what_is_computed_needs_no_stock_output(add, make_step):
    add("a", 40, gamma=0.3)
    add("n", 30, gamma=1)
    add("b", 20, gamma=5, heads=[0, 4], layers=[1])
    run = make_step(["a", "n", "b"], [40, 30, 25], [40, 30, 1])
    plan = run.plan()
    for layer in range(3):
        computed = plan.computed(layer)
        assert computed <= ({0, 2} if layer == 1 else {0})
        stock = run.stock().float()
        for row in computed:
            stock[run.rows(row)] = float("nan")
        output = run.apply(plan, layer, stock.clone())
        assert torch.isfinite(output).all()
        assert torch.equal(output[run.rows(1)], stock[run.rows(1)])


def test_tallies_count_positions_and_average_masses(add, make_step):
    first, second = add("a", 40, gamma=0.3), add("b", 20, gamma=5, heads=[0, 4], layers=[1])
    run = make_step(["a", "b"], [40, 25], [40, 1])
    plan = run.plan()
    for layer in range(3):
        run.apply(plan, layer, run.stock().float())
    seconds = plan.finish()
    assert set(seconds) == {"zerotuning"}
    assert seconds["zerotuning"] > 0
    assert (first.covered, second.covered) == (40, 25)

    tally = first.programs[0].tally
    assert (tally.prompt_tokens, tally.completion_tokens, tally.count) == (40, 0, 40 * 6 * 3)
    p, _ = run.case.dense(0)
    mass = tally.sums["key0_mass_before"] / tally.count
    assert mass == pytest.approx(p[..., 0].mean().item(), rel=1e-5)
    changed = reference.zerotuning(p, torch.tensor(0.3).double())
    mass = tally.sums["key0_mass_after"] / tally.count
    assert mass == pytest.approx(changed[..., 0].mean().item(), rel=1e-4)

    tally = second.programs[0].tally
    assert (tally.prompt_tokens, tally.completion_tokens, tally.count) == (0, 1, 2)
    p, _ = run.case.dense(1)
    mass = tally.sums["key0_mass_before"] / tally.count
    assert mass == pytest.approx(p[:, [0, 4], 0].mean().item(), rel=1e-5)


def finish(run):
    plan = run.plan()
    for layer in range(3):
        run.apply(plan, layer, run.stock().float())
    plan.finish()


def test_chunks_add_up_and_the_last_of_the_prompt_may_be_one_row(add, make_step):
    request = add("a", 40)
    for length, span in ((16, 16), (39, 23), (40, 1), (41, 1), (42, 1)):
        finish(make_step(["a"], [length], [span]))
    tally = request.programs[0].tally
    assert (tally.prompt_tokens, tally.completion_tokens) == (40, 2)
    assert tally.count == 42 * 6 * 3


def test_recomputed_positions_are_not_counted_twice(add, make_step):
    request = add("a", 40)
    finish(make_step(["a"], [40], [40]))
    finish(make_step(["a"], [41], [1]))
    before = (request.programs[0].tally.count, dict(request.programs[0].tally.sums))
    # Preempted: everything again, in two steps, then one new position.
    finish(make_step(["a"], [30], [30]))
    finish(make_step(["a"], [41], [11]))
    tally = request.programs[0].tally
    assert (tally.count, tally.sums) == before
    finish(make_step(["a"], [42], [1]))
    assert (tally.prompt_tokens, tally.completion_tokens, tally.count) == (40, 2, 42 * 18)


def test_recomputed_positions_are_calibrated_all_the_same(add, make_step):
    request = add("a", 40, gamma=0.3)
    request.covered = 40
    run = make_step(["a"], [40], [40])
    output = run.apply(run.plan(), 0, run.stock().float())
    torch.testing.assert_close(output.double(), run.expected([[0.3] * 6]), **TOLERANCE)


def test_after_a_cached_prefix_only_the_rest_is_added(add, make_step):
    request = add("a", 40, cached=32)
    finish(make_step(["a"], [40], [8]))
    tally = request.programs[0].tally
    assert (tally.prompt_tokens, tally.count) == (40, 8 * 18)


def test_rows_that_do_not_see_key_0_keep_every_bit_and_are_not_counted(add, make_step):
    request = add("a", 64, gamma=0.3)
    run = make_step(["a"], [64], [64], window=16)
    plan = run.plan()
    stock = run.stock().float()
    for layer in range(3):
        output = run.apply(plan, layer, stock.clone())
        torch.testing.assert_close(output[16:], stock[16:])
        assert plan.computed(layer) or torch.equal(output[16:], stock[16:])
        assert (output[1:16] != stock[1:16]).any(-1).all()
    plan.finish()
    tally = request.programs[0].tally
    assert (tally.prompt_tokens, tally.count) == (16, 16 * 18)


def test_a_plan_nobody_applied_counts_nothing(add, make_step):
    request = add("a", 40)
    make_step(["a"], [40], [40]).plan().finish()
    assert request.programs[0].tally.count == 0
    assert request.programs[0].tally.prompt_tokens == 0


@pytest.fixture
def head_scale(make_calibrator):
    """Doubles head 2 in layer 1, from position 5 on, leaving out 7 and 8."""

    def resolve(self, bound, layer, facts, prompt, observed):
        heads = np.arange(facts.query_heads) == 2
        plan = LayerPlan(heads, {"scale": np.full(facts.query_heads, 2, np.float32)})
        return plan if layer == 1 else None

    def coefficients(self, masses, parameters):
        scale = parameters["scale"]
        return Coefficients(torch.ones_like(scale), scale=scale, statistics={"scale": scale})

    return make_calibrator(
        "double",
        reweights=False,
        parameters=("scale",),
        resolve=resolve,
        coefficients=coefficients,
        rows=lambda self, bound, prompt: CalibratedRows(5, (Span(7, 9),)),
    )


def test_weights_first_head_scale_last(make_table, extra_args, facts, bound, head_scale):
    table = make_table(head_scale)
    scaling = head_scale.bind(head_scale.Settings(), facts)
    # In the wrong order on purpose: the engine applies weights first all the same.
    table.add("a", extra_args(scaling, bound), Prompt(12), 0)
    run = Step(table, ["a"], [12], [12])
    plan = run.plan()
    stock = run.stock().float()
    assert torch.equal(run.apply(plan, 0, stock.clone()), stock)

    output = run.apply(plan, 1, stock.clone())
    expected = run.expected([[1, 1, 0.5, 1, 1, 1]])
    scaled = [5, 6, 9, 10, 11]
    expected[scaled, 2] *= 2
    torch.testing.assert_close(output.double(), expected, **TOLERANCE)

    plan.finish()
    doubling, weighting = (program.tally for program in table.get("a").programs)
    assert (doubling.prompt_tokens, doubling.count, doubling.sums) == (5, 5, {"scale": 10.0})
    assert (weighting.prompt_tokens, weighting.count) == (12, 12)


@pytest.mark.parametrize(
    ("eligible", "prompt_tokens", "count", "total"),
    [(None, 6, 6, 6 * 2.0), (True, 6, 3 * 12, 3 * 12 * 2.0), (False, 6, 0, 0)],
)
def test_statistics_are_over_eligible_rows_and_tokens_over_rewritten_ones(
    make_table, extra_args, facts, head_scale, eligible, prompt_tokens, count, total
):
    def coefficients(self, masses, parameters):
        scale = parameters["scale"]
        even = torch.arange(scale.shape[0]) % 2 == 0
        apply = (even[:, None] & (torch.arange(6) == 2)).expand(scale.shape)
        among = None if eligible is None else torch.full_like(apply, eligible)
        statistics = {"scale": torch.full_like(scale, 2.0)}
        rest = torch.ones_like(scale)
        return Coefficients(
            rest, scale=2 * rest, apply=apply, eligible=among, statistics=statistics
        )

    def resolve(self, bound, layer, facts, prompt, observed):
        heads = np.arange(facts.query_heads) < 3
        return LayerPlan(heads, {"scale": np.ones(6, np.float32)}) if layer == 1 else None

    every = lambda self, bound, prompt: CalibratedRows()  # noqa: E731
    kind = type(head_scale)
    method = type(
        "Some", (kind,), {"coefficients": coefficients, "resolve": resolve, "rows": every}
    )
    table = make_table(method())
    table.add("a", extra_args(head_scale.bind(head_scale.Settings(), facts)), Prompt(12), 0)
    run = Step(table, ["a"], [12], [12])
    plan, stock = run.plan(), run.stock().float()
    output = run.apply(plan, 1, stock.clone())
    changed = (output != stock).any(-1).nonzero().tolist()
    assert changed == [[row, 2] for row in range(0, 12, 2)]
    plan.finish()
    tally = table.get("a").programs[0].tally
    assert (tally.prompt_tokens, tally.count, tally.sums) == (
        prompt_tokens,
        count,
        {"scale": total},
    )


@pytest.fixture
def stacked(monkeypatch):
    """How often tables were stacked."""
    calls = []
    of = step.Stack.of
    monkeypatch.setattr(step.Stack, "of", lambda *programs: calls.append(1) or of(*programs))
    return calls


def test_tables_are_stacked_once_for_the_same_requests(add, make_step, stacked):
    planner = Planner()
    add("a", 40)
    add("b", 30)
    for lengths in ([40, 30], [41, 31], [42, 32]):
        make_step(["a", "b"], lengths, [1, 1]).plan(planner)
    assert len(stacked) == 1
    make_step(["b", "a"], [33, 43], [1, 1]).plan(planner)
    assert len(stacked) == 2
    make_step(["b"], [34], [1]).plan(planner)
    assert len(stacked) == 3


def test_a_reused_id_is_stacked_anew(table, add, make_step, stacked):
    planner = Planner()
    add("a", 20, gamma=0.3)
    make_step(["a"], [20], [20]).plan(planner)
    table.drop(["a"])
    add("a", 20, gamma=4)
    run = make_step(["a"], [20], [20])
    output = run.apply(run.plan(planner), 0, run.stock().float())
    torch.testing.assert_close(output.double(), run.expected([[4.0] * 6]), **TOLERANCE)
    assert len(stacked) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_neutral_gamma_keeps_every_bit(add, make_step, dtype):
    add("a", 40, gamma=1)
    run = make_step(["a"], [40], [40], dtype=dtype)
    stock = run.stock().to(dtype)
    assert torch.equal(run.apply(run.plan(), 0, stock.clone()), stock)


@pytest.mark.parametrize("gamma", [1e-30, 1e-9, 1e-4, 0.01, 100.0])
def test_the_first_row_keeps_every_bit(add, make_step, gamma):
    add("a", 40, gamma=gamma)
    run = make_step(["a"], [40], [40], dtype=torch.bfloat16)
    stock = run.stock().bfloat16()
    output = run.apply(run.plan(), 0, stock.clone())
    assert torch.isfinite(output).all()
    assert torch.equal(output[0], stock[0])
