"""Requests that share an id share nothing else."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.integration.serving import Server
from tests.integration.state.calls import (
    SETTING,
    Caller,
    body,
    complete,
    counts,
    prompt,
    settled,
    wait_until_idle,
)

ID = "one-for-all"
STRONG = {"method": "zerotuning", "gamma": 8}
FEW = {"method": "zerotuning", "gamma": 0.1, "layers": [0, 1], "heads": [3]}
IN_TURN = [SETTING, None, STRONG, FEW, None, SETTING]
NEW_TOKENS = 12
TOLERANCE = 1e-3

Ask = Callable[[dict[str, Any]], tuple[dict[str, Any], dict[str, str]]]


def by_header(request: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    return request, {"X-Request-Id": ID}


def by_body(request: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    return {**request, "request_id": ID}, {}


@pytest.fixture(params=[by_header, by_body])
def identified(request: Any) -> Ask:
    """Gives a request the id, in one of the ways there are."""
    way: Ask = request.param
    return way


@pytest.fixture(scope="module")
def alone(server: Server) -> list[Any]:
    """Answers to requests with ids of their own, one after the other."""
    return [complete(server, body(prompt(7, 30), setting)) for setting in IN_TURN]


def check(answer: Any, alone: Any, setting: Any) -> None:
    """It is its own solo answer, with a receipt of its own."""
    assert answer["id"] == f"cmpl-{ID}"
    (found,), (expected,) = answer["choices"], alone["choices"]
    assert found["token_ids"] == expected["token_ids"]
    assert found["logprobs"]["token_logprobs"] == pytest.approx(
        expected["logprobs"]["token_logprobs"], abs=TOLERANCE
    )
    assert (setting is None) == ("calibration" not in answer)
    if setting is not None:
        assert answer["calibration"]["digest"] == alone["calibration"]["digest"]
        assert counts(answer) == counts(alone) == (30, NEW_TOKENS - 1)


def ask(server: Server, identified: Ask, setting: Any) -> Any:
    request, headers = identified(body(prompt(7, 30), setting))
    return complete(server, request, **headers)


def test_the_settings_differ(alone):
    first, plain, strong, few, *_ = [answer["choices"][0]["logprobs"] for answer in alone]
    logprobs = [each["token_logprobs"] for each in (first, plain, strong, few)]
    for index, one in enumerate(logprobs):
        for other in logprobs[:index]:
            gaps = [abs(a - b) for a, b in zip(one, other, strict=True)]
            assert max(gaps) > 10 * TOLERANCE


def test_one_after_the_other(server, identified, alone):
    for setting, expected in zip(IN_TURN, alone, strict=True):
        check(ask(server, identified, setting), expected, setting)


def test_all_at_once(server, identified, alone):
    with ThreadPoolExecutor(len(IN_TURN)) as pool:
        answers = list(pool.map(lambda setting: ask(server, identified, setting), IN_TURN))
    for setting, answer, expected in zip(IN_TURN, answers, alone, strict=True):
        check(answer, expected, setting)


@pytest.mark.parametrize("earlier", [SETTING, None], ids=["calibrated", "plain"])
def test_while_an_earlier_one_runs_and_after_it_is_gone(server, identified, alone, earlier):
    before = settled(server)
    request, headers = identified(body(prompt(8, 20), earlier, max_tokens=1500, stream=True))
    caller = Caller(server, request, **headers)
    assert len(caller.events(3)) == 3
    for setting, expected in zip(IN_TURN[:3], alone, strict=False):
        check(ask(server, identified, setting), expected, setting)
    # It still ran, and nobody else's end was taken for its own.
    assert len(caller.events(3)) == 3
    caller.hang_up()
    for setting, expected in zip(IN_TURN, alone, strict=True):
        check(ask(server, identified, setting), expected, setting)
    wait_until_idle(server)
    assert settled(server) == before
