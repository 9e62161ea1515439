import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from server.engine.context import StepContext
from tests.server.kernels.paging import problem


@pytest.fixture
def make_new(extra_args):
    """A newly scheduled request."""

    def make(request_id, length, cached=0, plain=False, embedded=False):
        arguments = None if plain else extra_args(ticket=f"t-{request_id}")
        return SimpleNamespace(
            req_id=request_id,
            sampling_params=SimpleNamespace(extra_args=arguments),
            prompt_token_ids=None if embedded else [0] * length,
            prompt_embeds=torch.zeros(length, 8) if embedded else None,
            num_computed_tokens=cached,
        )

    return make


@pytest.fixture
def context(table):
    batch = []
    made = StepContext(table, lambda metadata: batch)
    made.batch = batch
    return made


def begin(context, scheduled, new=(), finished=(), preempted=None):
    context.begin(
        SimpleNamespace(
            finished_req_ids=set(finished),
            preempted_req_ids=preempted,
            scheduled_new_reqs=list(new),
            num_scheduled_tokens=scheduled,
        )
    )


def metadata(spans, lengths):
    start = torch.tensor([0, *spans]).cumsum(0)
    # Buffers are padded beyond the batch.
    return SimpleNamespace(
        num_reqs=len(spans),
        query_start_loc_cpu=torch.cat([start, start[-1:]]),
        seq_lens=torch.tensor([*lengths, 0]),
    )


def run(context, spans, lengths):
    plan = context.plan(metadata(spans, lengths))
    case = problem(lengths, spans)
    for layer in range(3):
        plan.apply(layer, case.query, torch.randn_like(case.query), case.cache, case.geometry)
    return plan


def test_a_step_reports_its_calibrated_requests(context, make_new):
    begin(context, {"a": 20, "p": 4, "b": 9}, [make_new("a", 20), make_new("b", 9)])
    context.batch[:] = ["p", "b", "a"]
    run(context, [4, 9, 20], [4, 9, 20])
    reports = context.finish()
    tokens = {name: report.tallies[0].prompt_tokens for name, report in reports.items()}
    assert tokens == {"a": 20, "b": 9}
    assert [report.ticket for report in reports.values()] == ["t-a", "t-b"]
    seconds = [report.seconds for report in reports.values() if report.seconds is not None]
    assert len(seconds) == 1
    assert seconds[0]["zerotuning"] > 0


def test_embeddings_in_place_of_tokens_are_a_prompt_too(context, make_new):
    begin(context, {"a": 20}, [make_new("a", 20, embedded=True)])
    context.batch[:] = ["a"]
    run(context, [20], [20])
    (tally,) = context.finish()["a"].tallies
    assert (tally.prompt_tokens, tally.completion_tokens) == (20, 0)


def test_all_groups_of_layers_share_one_plan(context, make_new):
    begin(context, {"a": 20}, [make_new("a", 20)])
    context.batch[:] = ["a"]
    assert context.plan(metadata([20], [20])) is context.plan(metadata([20], [20]))


def test_a_step_of_plain_requests_has_no_plan(context, make_new):
    begin(context, {"p": 4}, [make_new("p", 4, plain=True)])
    context.batch[:] = ["p"]
    assert context.plan(metadata([4], [4])) is None
    assert context.finish() == {}


def test_a_calibrated_request_that_waits_makes_no_plan(context, make_new):
    begin(context, {"a": 20}, [make_new("a", 20)])
    context.batch[:] = ["a"]
    run(context, [20], [20])
    context.finish()
    begin(context, {"p": 4}, [make_new("p", 4, plain=True)])
    context.batch[:] = ["p"]
    assert context.plan(metadata([4], [4])) is None
    begin(context, {"a": 1})
    context.batch[:] = ["a"]
    run(context, [1], [21])
    assert context.finish()["a"].tallies[0].completion_tokens == 1


def test_an_id_that_ends_and_returns_in_one_step_is_new(context, table, make_new):
    begin(context, {"a": 20}, [make_new("a", 20)])
    context.batch[:] = ["a"]
    run(context, [20], [20])
    context.finish()
    begin(context, {"a": 5}, [make_new("a", 5)], finished=["a"])
    run(context, [5], [5])
    assert context.finish()["a"].tallies[0].prompt_tokens == 5
    begin(context, {}, finished=["a"])
    assert len(table) == 0


def test_a_plan_does_not_outlive_its_step(context, make_new):
    begin(context, {"a": 20}, [make_new("a", 20)])
    context.batch[:] = ["a"]
    run(context, [20], [20])
    assert context.finish()
    assert context.finish() == {}
    assert context.plan(metadata([20], [20])) is None


def test_a_preempted_request_that_is_announced_again_goes_on(context, table, make_new):
    """As the V2 runner is told, with the tokens it has written as part of what to compute."""
    begin(context, {"a": 20}, [make_new("a", 20)])
    context.batch[:] = ["a"]
    run(context, [20], [20])
    context.finish()
    begin(context, {"a": 1})
    run(context, [1], [21])
    context.finish()
    begin(context, {}, preempted={"a"})
    begin(context, {"a": 21}, [make_new("a", 20)])
    run(context, [21], [21])
    (tally,) = context.finish()["a"].tallies
    assert (tally.prompt_tokens, tally.completion_tokens) == (20, 1)


@pytest.mark.parametrize("returned", [True, False])
def test_a_new_request_with_the_id_of_a_preempted_one_is_new(context, table, make_new, returned):
    begin(context, {"a": 20}, [make_new("a", 20)])
    first = table.get("a")
    begin(context, {}, preempted={"a"})
    if returned:
        begin(context, {"a": 20}, [make_new("a", 20)])
        assert table.get("a") is first
    begin(context, {"a": 5}, [make_new("a", 5)], finished=["a"])
    assert table.get("a").prompt.length == 5
    begin(context, {"a": 7}, [make_new("a", 7)])
    assert table.get("a").prompt.length == 7


def test_nothing_is_left_of_requests_that_ended(context, table, make_new):
    begin(context, {"a": 20}, [make_new("a", 20)])
    context.batch[:] = ["a"]
    run(context, [20], [20])
    context.finish()
    for n in (1, 2, 3):
        begin(context, {"a": 1})
        run(context, [1], [20 + n])
        context.finish()
    left = weakref.ref(table.get("a").programs[0])
    begin(context, {}, finished=["a"])
    gc.collect()
    assert left() is None
