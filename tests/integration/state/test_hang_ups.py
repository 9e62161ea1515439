"""Clients that hang up leave nothing behind and are counted once."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import pytest

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

NEW_TOKENS = 800


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


@pytest.mark.parametrize("moment", [in_the_prompt, generating, queued])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("calibration", [None, SETTING], ids=["plain", "calibrated"])
def test_nothing_is_left_of_a_client_that_hangs_up(server, moment, stream, calibration):
    seeds = iter(
        random.Random(f"{moment.__name__} {stream} {calibration}").sample(range(10**6), 20)
    )

    def call(length: int) -> Caller:
        tokens = prompt(next(seeds), length)
        return Caller(server, body(tokens, calibration, max_tokens=NEW_TOKENS, stream=stream))

    before, tokens = settled(server), server.metric("vllm:generation_tokens_total")
    counted = outcomes(server)
    callers = moment(server, call)
    if stream and moment is generating:
        for caller in callers:
            assert len(caller.events(3)) == 3
    for caller in callers:
        caller.hang_up()
    wait_until_idle(server)
    generated = server.metric("vllm:generation_tokens_total") - tokens
    if moment is in_the_prompt:
        assert generated == 0
    assert generated < NEW_TOKENS
    failed = {"failed": len(callers)} if calibration else {}
    assert growth(counted, outcomes(server)) == failed
    assert settled(server) == before


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
    before, counted = settled(server), outcomes(server)
    draw = random.Random(8)
    calls: list[tuple[float, Any]] = []
    for index in range(24):
        request = body(prompt(100 + index, 6), SETTING, max_tokens=4, stream=index % 2 == 0)
        calls.append((time.monotonic() + draw.uniform(0, 1.2), Caller(server, request)))
    for moment, caller in sorted(calls, key=lambda call: call[0]):
        time.sleep(max(0, moment - time.monotonic()))
        caller.hang_up()
    wait_until_idle(server)
    ended = growth(counted, outcomes(server))
    assert sum(ended.values()) == len(calls)
    assert set(ended) == {"applied", "failed"}
    assert settled(server) == before
