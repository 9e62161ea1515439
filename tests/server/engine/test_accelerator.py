"""Steps over a cache as a GPU keeps it, with the kernels that read it, against dense equations."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from calibrators.interface import Bound, Prompt
from server.engine import rewrites
from server.engine.batch import members
from server.engine.step import Planner
from server.kernels.partials import PagedCache
from tests.server.engine.taps.test_columns import Sinks, act, params
from tests.server.engine.test_step import Step
from tests.server.engine.toy import HEAD_DIM, Toy, check
from tests.server.kernels.gpu.kernels import runnable
from tests.server.kernels.gpu.pages import DEVICE, strided
from tests.server.kernels.gpu.test_rescale import log_sum_exps

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="these steps are of the CPU; their kernels are interpreted"
)


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """Interpreted."""
    with runnable():
        yield


@pytest.mark.parametrize("way", ["closed form", "stock log-sum-exps", "coefficients"])
def test_each_request_gets_its_own_calibration(add, table, monkeypatch, way):
    if way == "coefficients":
        monkeypatch.setattr(rewrites, "_rescales", lambda method: False)
    add("a", 18, gamma=0.3)
    add("p", 9, plain=True)
    b = add("b", 20, gamma=5, heads=[0, 4], layers=[1])
    run = Step(table, ["a", "p", "b"], [18, 9, 25], [3, 2, 1], block=16)
    batch = members(table, run.names, run.starts, run.lengths)
    plan, case = Planner(device=DEVICE).plan(batch), run.case
    cache = strided(case.cache, HEAD_DIM)
    known = log_sum_exps(case) if way == "stock log-sum-exps" else None
    stock = run.stock().float()
    for layer, of_b in ((0, [1] * 6), (1, [5, 1, 1, 1, 5, 1]), (2, [1] * 6)):
        output = stock.clone()
        plan.apply(layer, case.query, output, cache, case.geometry, known)
        expected = run.expected([[0.3] * 6, [1] * 6, of_b])
        torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-4)
        assert torch.equal(output[run.rows(1)], stock[run.rows(1)])
    plan.finish()
    (program,) = b.programs
    assert not b.failed
    assert (program.tally.completion_tokens, program.tally.count) == (1, 2)
    mass = case.dense(2)[0][0, [0, 4], 0].sum().item()
    assert program.tally.sums["key0_mass_before"] == pytest.approx(mass, rel=1e-4)


def test_a_method_that_observes_its_prompt(make_table, extra_args):
    """ACT in a step with a plain request, then a generated row with thresholds of its own."""
    table, prompts = make_table(Sinks()), {"a": 13, "b": 7, "p": 4}
    settings = {"a": params(), "b": params(0.1, 1.5, heads=[1, 4], decode="row")}
    for name, given in settings.items():
        bound = Bound("sinks", given, 2, 12)
        table.add(name, extra_args(bound), Prompt(prompts[name]), 0)
    lengths = {name: length + 1 for name, length in prompts.items()}
    toy = Toy(table, lengths, lambda *cache: strided(PagedCache(*cache), HEAD_DIM, "HND"))
    first = toy.step({name: (0, length) for name, length in prompts.items()})
    second = toy.step({name: (length, length + 1) for name, length in prompts.items()})
    for name, given in settings.items():
        rewrite = partial(act, given, prompts[name])
        check(toy, name, rewrite, first[name])
        check(toy, name, rewrite, second[name], prompts[name])
        assert not table.get(name).failed
