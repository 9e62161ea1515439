"""Clients that hang up leave nothing behind and are counted once."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from tests.integration.attempts import in_time
from tests.integration.serving import Server
from tests.integration.state.calls import (
    SETTING,
    Caller,
    body,
    growth,
    outcomes,
    prompt,
    settled,
    wait_until,
    wait_until_idle,
)
from tests.integration.state.conftest import PLACES

# Far more than it takes to hang up, and few enough to tell that they were not generated.
NEW_TOKENS = 1400
# What all together may generate until everybody has hung up in time: fifty steps.
FEW = 50 * PLACES
DISCONNECTS = int(os.environ.get("DISCONNECTS", "1000"))
PARALLEL = 16
GROWTH = 10 << 20
log = logging.getLogger(__name__)


def in_the_prompt(server: Server, call: Callable[..., Caller]) -> list[Caller]:
    """The first of several prompts is being computed, in steps of 64 tokens."""
    callers = [call(length=640) for _ in range(3)]
    wait_until(lambda: server.metric("vllm:num_requests_running") > 0, "none runs")
    return callers


def generating(server: Server, call: Callable[..., Caller]) -> list[Caller]:
    """All have some tokens."""
    before = server.metric("vllm:generation_tokens_total")
    callers = [call(length=20) for _ in range(3)]
    wait_until(
        lambda: server.metric("vllm:generation_tokens_total") >= before + 12, "nothing is generated"
    )
    return callers


def queued(server: Server, call: Callable[..., Caller]) -> list[Caller]:
    """Some wait for a place."""
    callers = [call(length=5) for _ in range(PLACES + 3)]
    wait_until(lambda: server.metric("vllm:num_requests_waiting") >= 3, "none waits")
    return callers[::-1]


def work(server: Server) -> tuple[float, float]:
    """Tokens generated so far, and requests that went on to their last."""
    return (
        server.metric("vllm:generation_tokens_total"),
        server.metric("vllm:request_success_total", finished_reason="length"),
    )


def taken_up(server: Server, counted: dict[str, float]) -> float:
    """Calibrated requests since `counted`. One whose client is gone before is not counted."""
    ended = sum(growth(counted, outcomes(server)).values())
    return ended + server.metric("trimtab_active_requests")


@pytest.mark.parametrize("moment", [in_the_prompt, generating, queued])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("calibration", [None, SETTING], ids=["plain", "calibrated"])
def test_nothing_is_left_of_a_client_that_hangs_up(server, moment, stream, calibration):
    draw = random.Random(f"{moment.__name__} {stream} {calibration}")

    def call(length: int) -> Caller:
        tokens = prompt(draw.randrange(10**6), length)
        return Caller(server, body(tokens, calibration, max_tokens=NEW_TOKENS, stream=stream))

    def attempt(_: int) -> bool:
        before, counted, tokens, ended = settled(server), outcomes(server), *work(server)
        callers = moment(server, call)
        if calibration:
            wait_until(lambda: taken_up(server, counted) == len(callers), "one is not taken up")
        if stream and moment is generating:
            for caller in callers:
                assert len(caller.events(3)) == 3
        for caller in callers:
            caller.hang_up()
        wait_until_idle(server)
        tokens_now, ended_now = work(server)
        assert ended_now == ended, "some went on to their last token"
        failed = {"failed": len(callers)} if calibration else {}
        assert growth(counted, outcomes(server)) == failed
        assert settled(server) == before
        generated = tokens_now - tokens
        return generated == 0 if moment is in_the_prompt else generated < FEW

    in_time(attempt)


def test_many_choices_of_many_prompts_are_one_request(server):
    before, counted = settled(server), outcomes(server)
    request = body([prompt(3, 9), prompt(4, 9)], SETTING, n=2, max_tokens=NEW_TOKENS, stream=True)
    caller = Caller(server, {**request, "temperature": 1, "seed": 1})
    assert len(caller.events(9)) == 9
    caller.hang_up()
    wait_until_idle(server)
    assert growth(counted, outcomes(server)) == {"failed": 1}
    assert settled(server) == before


def test_requests_are_counted_once_whenever_their_clients_hang_up(server):
    draw = random.Random(8)
    requests = [
        body(prompt(100 + index, 6), SETTING, max_tokens=4, stream=index % 2 == 0)
        for index in range(24)
    ]

    def send(counted: dict[str, float]) -> list[Caller]:
        callers = [Caller(server, request) for request in requests]
        wait_until(lambda: taken_up(server, counted) == len(requests), "one is not taken up")
        return callers

    def attempt(_: int) -> bool:
        before, began = settled(server), time.monotonic()
        unhurried = send(outcomes(server))
        wait_until_idle(server)
        taken, counted = time.monotonic() - began, outcomes(server)
        callers, began = send(counted), time.monotonic()
        moments = sorted(draw.uniform(0, taken) for _ in callers)
        for moment, caller in zip(moments, draw.sample(callers, len(callers)), strict=True):
            time.sleep(max(0, began + moment - time.monotonic()))
            caller.hang_up()
        for caller in unhurried:
            caller.hang_up()
        wait_until_idle(server)
        ended = growth(counted, outcomes(server))
        assert sum(ended.values()) == len(requests)
        assert settled(server) == before
        return set(ended) == {"applied", "failed"}

    in_time(attempt)


def leave(server: Server, draw: random.Random) -> None:
    """Ask for much, and hang up at any moment, with a farewell or without."""
    setting = draw.choice([None, SETTING])
    tokens = prompt(draw.randrange(10**6), draw.randint(1, 300))
    stream = draw.random() < 0.5
    caller = Caller(server, body(tokens, setting, max_tokens=NEW_TOKENS, stream=stream))
    time.sleep(draw.uniform(0, 0.6))
    if draw.random() < 0.5:
        caller.break_off()
    else:
        caller.hang_up()


def resident(server: Server) -> dict[str, int]:
    """Bytes of memory by process."""
    with server.client() as client:
        sizes = client.get("/sizes").json()
    return {name: psutil.Process(sizes[name]["pid"]).memory_info().rss for name in sizes}


@pytest.mark.long
def test_a_thousand_random_disconnects_leave_nothing(server):
    draws = [random.Random(seed) for seed in range(2 * DISCONNECTS)]
    with ThreadPoolExecutor(PARALLEL) as pool:
        # As many before: what grows once is not what leaks.
        list(pool.map(lambda draw: leave(server, draw), draws[:DISCONNECTS]))
        before, memory = settled(server), resident(server)
        list(pool.map(lambda draw: leave(server, draw), draws[DISCONNECTS:]))
    assert settled(server) == before
    assert server.metric("vllm:kv_cache_usage_perc") == 0
    growth = {name: size - memory[name] for name, size in resident(server).items()}
    shown = {name: f"{size / (1 << 20):.1f} MiB" for name, size in growth.items()}
    log.info("%d disconnects: memory grew by %s", DISCONNECTS, shown)
    assert max(growth.values()) < GROWTH
