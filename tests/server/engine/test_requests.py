import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibrators.interface import Bound, LayerPlan, Pool, Prompt, Rows, Skip, Span
from server.engine.payload import KEY, Payload
from server.engine.programs import HeadShard
from server.engine.requests import positions

SPANS = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 40)).map(lambda pair: Span(*sorted(pair))),
    max_size=3,
)


@given(st.integers(0, 40), SPANS, st.integers(0, 40), st.integers(0, 40))
def test_positions_are_the_calibrated_ones_in_the_window(first, skip, start, stop):
    chosen = positions(Rows(first, tuple(skip)), start, stop, stop)
    expected = [
        i
        for i in range(start, stop)
        if i >= first and not any(span.start <= i < span.stop for span in skip)
    ]
    assert chosen.tolist() == expected
    assert chosen.dtype == np.int32


def test_plain_requests_are_not_in_the_table(table, add):
    assert add("a", 10, plain=True) is None
    assert len(table) == 0


def test_a_program_has_a_row_for_every_layer(add):
    request = add("a", 10, gamma=0.25, layers=[0, 2], heads=[1, 4])
    (program,) = request.programs
    assert program.heads.shape == (3, 6)
    assert np.argwhere(program.heads).tolist() == [[0, 1], [0, 4], [2, 1], [2, 4]]
    gamma = program.parameters["gamma"]
    assert gamma.dtype == np.float32
    assert (gamma[program.heads] == 0.25).all()
    assert [[pool.keys.tolist() for pool in p.prompt] for p in program.pools] == [
        [[0]],
        [[]],
        [[0]],
    ]
    assert (request.ticket, request.prompt.length, request.covered) == ("t-a", 10, 0)


def test_a_rank_holds_its_own_heads(make_table, extra_args):
    arguments = extra_args(heads=[0, 3, 5])
    whole = make_table()
    whole.add("a", arguments, Prompt(5), 0)
    parts = []
    for start in (0, 2, 4):
        table = make_table(shard=HeadShard(start, start + 2))
        table.add("a", arguments, Prompt(5), 0)
        parts.append(table.get("a").programs[0])
    program = whole.get("a").programs[0]
    assert (np.concatenate([p.heads for p in parts], 1) == program.heads).all()
    gammas = [p.parameters["gamma"] for p in parts]
    assert (np.concatenate(gammas, 1) == program.parameters["gamma"]).all()


@pytest.mark.parametrize(("cached", "counted"), [(0, 0), (6, 6), (10, 10), (12, 10)])
def test_cached_prompt_tokens_count_as_calibrated(add, cached, counted):
    request = add("a", 10, cached=cached)
    assert request.covered == cached
    tally = request.programs[0].tally
    assert (tally.prompt_tokens, tally.completion_tokens, tally.count) == (counted, 0, 0)


def test_cached_tokens_outside_the_calibrated_rows_do_not_count(
    make_table, make_calibrator, extra_args, facts
):
    late = make_calibrator("late", rows=lambda self, bound, prompt: Rows(4, (Span(6, 8),)))
    table = make_table(late)
    bound = late.bind(late.Settings(), facts)
    table.add("a", extra_args(bound), Prompt(20), 9)
    assert table.get("a").programs[0].tally.prompt_tokens == 3


def test_a_layer_left_alone_has_no_heads_pools_or_parameters(
    make_table, make_calibrator, extra_args, facts
):
    def resolve(self, bound, layer, facts, prompt, observed):
        if layer != 1:
            return None
        heads = np.ones(facts.query_heads, np.bool_)
        keys = Pool(np.array([1, prompt.length - 1], np.int32))
        return LayerPlan(heads, {"weight": np.full(6, 2, np.float32)}, (keys,))

    method = make_calibrator("one", pools=("keys",), parameters=("weight",), resolve=resolve)
    table = make_table(method)
    table.add("a", extra_args(method.bind(method.Settings(), facts)), Prompt(8), 0)
    (program,) = table.get("a").programs
    assert program.heads.any(1).tolist() == [False, True, False]
    assert program.parameters["weight"].tolist() == [[0] * 6, [2] * 6, [0] * 6]
    assert [pools.prompt[0].keys.tolist() for pools in program.pools] == [[], [1, 7], []]


@pytest.mark.parametrize("length", [20, 19])
def test_images_that_came_with_the_request_count(table, bound, length):
    known = Prompt(20, (Span(2, 6),), (Span(8, 12),), (Span(9, 10),))
    arguments = {KEY: Payload("ticket", (bound,), prompt=known).to_extra_args()}
    table.add("a", arguments, Prompt(length), 0)
    request = table.get("a")
    assert request.prompt == request.programs[0].prompt == known
    assert request.failed == (length != known.length)


def test_a_method_that_has_nothing_to_do_says_so(make_table, make_calibrator, extra_args, facts):
    def resolve(self, bound, layer, facts, prompt, observed):
        return Skip("nothing here") if layer else None

    method = make_calibrator("idle", resolve=resolve)
    table = make_table(method)
    table.add("a", extra_args(method.bind(method.Settings(), facts)), Prompt(8), 3)
    (program,) = table.get("a").programs
    assert not program.active.any()
    assert (program.tally.prompt_tokens, program.tally.skip) == (3, "nothing here")


def test_a_method_that_this_worker_does_not_know_fails_its_request(table, extra_args):
    table.add("a", extra_args(Bound("unheard-of", {}, 1, 1)), Prompt(8), 0)
    assert (table.get("a").failed, table.get("a").programs) == (True, [])


def test_a_reused_id_starts_anew(table, add):
    first = add("a", 10, cached=4, gamma=0.5)
    first.covered = 99
    second = add("a", 7, gamma=2)
    assert table.get("a") is second
    assert (second.covered, second.programs[0].tally.prompt_tokens) == (0, 0)
    assert second.programs[0].parameters["gamma"].max() == 2
    assert add("a", 7, plain=True) is None
    assert len(table) == 0


def test_dropping_forgets_and_ignores_strangers(table, add):
    add("a", 3)
    add("b", 3)
    table.drop(["a", "never-seen"])
    assert table.get("a") is None
    assert table.get("b") is not None
    assert len(table) == 1
