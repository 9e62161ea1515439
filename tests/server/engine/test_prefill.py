import random
from itertools import pairwise

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from calibrators.interface import Prefill
from server.engine.prefill import chunk
from tests.server.engine.scheduling import make_config, make_driver

WHOLE, SPLIT, ANY = Prefill.WHOLE, Prefill.SPLIT_LAST, Prefill.ANY
MANY = 400


@pytest.fixture
def make(tmp_path):
    """A driver; options go to the configuration."""

    def make(**options):
        return make_driver(make_config(tmp_path, **options))

    return make


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def driver(make, request):
    return make(async_scheduling=request.param)


@pytest.mark.parametrize(
    ("policy", "prompt", "computed", "offered", "expected"),
    [
        (ANY, 10, 0, 3, 3),
        (ANY, 10, 9, 1, 1),
        (WHOLE, 10, 0, 10, 10),
        (WHOLE, 10, 0, 9, 0),
        (WHOLE, 10, 0, 14, 14),
        (WHOLE, 10, 10, 1, 1),
        (WHOLE, 10, 14, 3, 3),
        (WHOLE, 1, 0, 1, 1),
        (SPLIT, 10, 0, 20, 9),
        (SPLIT, 10, 0, 4, 4),
        (SPLIT, 10, 4, 6, 5),
        (SPLIT, 10, 9, 1, 1),
        (SPLIT, 10, 9, 5, 5),
        (SPLIT, 10, 10, 1, 1),
        (SPLIT, 2, 0, 2, 1),
        (SPLIT, 1, 0, 1, 1),
        (SPLIT, 1, 0, 4, 4),
    ],
)
def test_sizes_of_chunks(policy, prompt, computed, offered, expected):
    assert chunk(policy, prompt, computed, offered) == expected


def test_the_scheduler_is_asynchronous_where_the_configuration_is(make):
    assert not isinstance(make().scheduler, AsyncScheduler)
    assert isinstance(make(async_scheduling=True).scheduler, AsyncScheduler)


def test_plain_requests_are_scheduled_as_by_vllm(tmp_path):
    """Chunk by chunk, with more requests than slots and preemptions."""
    logs = []
    for options in ({}, {"make": Scheduler}):
        draw = random.Random(3)
        driver = make_driver(make_config(tmp_path, blocks=24), **options)
        for index in range(40):
            driver.add(f"{index}", draw.randrange(1, 200), tokens=draw.randrange(1, 40), seed=index)
            driver.step()
        driver.run()
        logs.append((dict(driver.chunks), driver.finished))
    assert logs[0] == logs[1]


def test_a_whole_prompt_comes_in_one_step(driver):
    driver.add("plain", 150)
    driver.add("whole", 60, WHOLE)
    driver.add("last", 40)
    driver.run()
    assert [size for _, _, size in driver.chunks["plain"]][:2] != [150]
    assert driver.chunks["whole"][0][1:] == (0, 60)
    assert len(driver.finished) == 3


def test_the_last_token_comes_alone(driver):
    driver.add("other", 30)
    driver.add("split", 100, SPLIT)
    driver.add("one", 1, SPLIT)
    driver.run()
    starts = [(start, size) for _, start, size in driver.chunks["split"]]
    assert (99, 1) in starts
    assert all(start >= 99 or start + size <= 99 for start, size in starts)
    assert driver.chunks["one"][0][1:] == (0, 1)


def test_a_whole_prompt_as_long_as_a_step_does_not_wait_for_running_requests(driver):
    for index in range(3):
        driver.add(f"decode{index}", 8, tokens=MANY)
    for _ in range(5):
        driver.step()
    driver.add("whole", 64, WHOLE)
    driver.step()
    assert driver.chunks["whole"] == [(5, 0, 64)]
    driver.step()
    assert [driver.steps_of(f"decode{i}")[-1] for i in range(3)] == [6, 6, 6]


def test_only_what_the_whole_prompt_needs_is_held_back(driver):
    for index in range(4):
        driver.add(f"decode{index}", 8, tokens=MANY)
    for _ in range(5):
        driver.step()
    driver.add("whole", 62, WHOLE)
    driver.step()
    assert driver.chunks["whole"] == [(5, 0, 62)]
    assert sum(driver.steps_of(f"decode{i}")[-1] == 5 for i in range(4)) == 2


def test_a_whole_prompt_does_not_wait_for_a_long_one(driver):
    driver.add("long", 600)
    driver.step()
    driver.add("whole", 64, WHOLE)
    for _ in range(3):
        driver.step()
    assert driver.chunks["whole"][0] == (1, 0, 64)
    assert driver.steps_of("long") == [0, 2, 3]


def test_a_stream_of_whole_prompts_starves_nobody(driver):
    driver.add("decode", 8, tokens=MANY)
    driver.add("long", 500)
    queue = []
    for index in range(60):
        queue.append(f"whole{index}")
        driver.add(f"whole{index}", 64, WHOLE, tokens=1)
        if index % 6 == 0:
            queue.append(f"plain{index}")
            driver.add(f"plain{index}", 20, tokens=2)
        driver.step()
    driver.run(300)
    steps = driver.steps_of("decode")
    assert max(after - before for before, after in pairwise(steps)) == 2
    assert driver.finished["long"] < 40
    assert len(driver.finished) == len(queue) + 1
    # The queue is served in order, a request every two steps at the latest.
    turns = [driver.steps_of(name)[0] for name in queue]
    turns = [turn for turn in turns if turn > driver.finished["long"]]
    assert len(turns) > 30
    assert all(0 <= after - before <= 2 for before, after in pairwise(turns))


def test_nobody_is_held_back_where_memory_is_short(make):
    """Neither by what is taken nor by what a running prompt is about to take."""
    driver = make(blocks=9)
    driver.add("running", 100, tokens=25)
    driver.step()
    driver.add("whole", 64, WHOLE)
    driver.run()
    steps = driver.steps_of("running")
    assert steps == list(range(len(steps)))
    assert driver.steps_of("whole")[0] >= driver.finished["running"]


def test_nobody_is_held_back_where_slots_are_taken(make):
    driver = make(slots=2)
    for name in ("one", "two"):
        driver.add(name, 8, tokens=30)
    driver.add("whole", 64, WHOLE)
    driver.run()
    steps = driver.steps_of("one")
    assert steps == list(range(len(steps)))
    assert driver.chunks["whole"][0][1:] == (0, 64)


def test_a_throttled_step_holds_nobody_back(make):
    driver = make()
    driver.add("decode", 8, tokens=MANY)
    driver.step()
    driver.add("whole", 64, WHOLE)
    driver.step(throttle_prefills=True)
    assert driver.steps_of("decode") == [0, 1]
    driver.step()
    assert driver.chunks["whole"] == [(2, 0, 64)]


def test_a_request_that_waits_for_its_grammar_is_passed(make):
    driver = make()
    driver.add("decode", 8, tokens=MANY)
    driver.step()
    driver.add("grammar", 10)
    driver.scheduler.requests[
        "grammar"
    ].status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    driver.add("whole", 64, WHOLE)
    driver.step()
    assert driver.chunks["whole"] == [(1, 0, 64)]


@pytest.mark.parametrize("policy", [WHOLE, SPLIT])
@pytest.mark.parametrize("async_scheduling", [False, True])
def test_what_was_preempted_comes_again_as_it_has_to(make, policy, async_scheduling):
    driver = make(blocks=14, async_scheduling=async_scheduling)
    driver.add("first", 60, tokens=120)
    driver.step()
    driver.add("cut", 50, policy, tokens=60)
    driver.add("plain", 10, tokens=10)
    driver.run()
    chunks = [(start, size) for _, start, size in driver.chunks["cut"]]
    again = [index for index, (start, _) in enumerate(chunks) if start == 0]
    assert len(again) > 1, "not preempted"
    for start, size in chunks:
        if policy is WHOLE:
            assert start >= 50 or (start == 0 and size >= 50)
        else:
            assert start >= 49 or start + size <= 49
    if policy is WHOLE:
        assert any(chunks[index][1] > 50 for index in again[1:])
    assert set(driver.finished) == {"first", "cut", "plain"}


@pytest.mark.parametrize("shareable", [False, True])
def test_blocks_of_others_are_read_where_sharing_is_allowed(make, shareable):
    driver = make()
    for name in ("one", "two"):
        driver.add(name, 64, ANY if shareable else WHOLE, seed=1, cache_salt="the same")
        driver.run()
    assert driver.chunks["two"][0][1:] == ((48, 16) if shareable else (0, 64))


def test_copies_side_by_side_are_whole_each(make):
    """The copies of `n > 1` have one salt."""
    driver = make()
    for index in range(3):
        driver.add(f"copy{index}", 50, WHOLE, seed=1, cache_salt="the same")
    driver.run()
    assert [driver.chunks[f"copy{i}"][0][1:] for i in range(3)] == [(0, 50)] * 3


@pytest.mark.parametrize(
    "limit", [{"budget": 64}, {"budget": 256, "long_prefill_token_threshold": 64}]
)
def test_a_whole_prompt_that_never_fits_does_not_stop_the_queue(make, limit):
    driver = make(**limit)
    driver.add("decode", 8, tokens=20)
    driver.step()
    driver.add("too long", 65, WHOLE)
    driver.add("behind", 30)
    driver.run(100)
    assert driver.chunks["too long"] == []
    assert driver.reasons["too long"] == "error"
    assert set(driver.finished) == {"decode", "too long", "behind"}


def test_a_long_prompt_may_be_limited_below_the_step(make):
    driver = make(budget=256, long_prefill_token_threshold=64)
    driver.add("other", 100, tokens=50)
    driver.add("whole", 64, WHOLE)
    driver.run()
    assert driver.chunks["whole"][0][1:] == (0, 64)


def test_requests_of_higher_priority_go_first(make):
    driver = make(policy="priority")
    driver.add("decode", 8, tokens=MANY)
    driver.step()
    driver.add("whole", 64, WHOLE, priority=1)
    driver.add("urgent", 20, priority=0)
    for _ in range(6):
        driver.step()
    assert driver.steps_of("urgent")[0] == 1
    assert driver.chunks["whole"][0][1:] == (0, 64)


@pytest.mark.parametrize("seed", range(6))
def test_any_mixture_ends_and_keeps_its_policies(make, seed):
    draw = random.Random(seed)
    driver = make(blocks=draw.choice([20, 40]), async_scheduling=bool(seed % 2))
    policies, lengths = {}, {}
    for index in range(60):
        name = f"{index}"
        policies[name] = policy = draw.choice([None, ANY, WHOLE, WHOLE, SPLIT])
        lengths[name] = draw.randrange(1, 65 if policy is WHOLE else 200)
        driver.add(name, lengths[name], policy, tokens=draw.randrange(1, 60))
        for _ in range(draw.randrange(3)):
            driver.step()
    driver.run(4000)
    assert set(driver.finished) == set(policies)
    for name, policy in policies.items():
        end = lengths[name]
        for _, start, size in driver.chunks[name]:
            if policy is WHOLE:
                assert start >= end or (start == 0 and size >= end)
            if policy is SPLIT:
                assert start >= end - 1 or start + size <= end - 1
