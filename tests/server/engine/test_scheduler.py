"""What rides on the outputs of vLLM's real scheduler."""

from __future__ import annotations

import numpy as np
import pytest

from server.engine.payload import Report, Tally
from server.engine.progress import Gain, Progress
from server.engine.scheduler import EVERY
from tests.server.engine.scheduling import make_config, make_driver


@pytest.fixture
def driver(tmp_path):
    return make_driver(make_config(tmp_path))


def reports(*names, seconds=0.5, failed=()):
    """Of prompts of eight tokens."""
    made = {name: Report(f"t-{name}", [Tally(8)], None, name in failed) for name in names}
    first = made[names[0]]
    return made | {names[0]: Report(first.ticket, first.tallies, {"act": seconds}, first.failed)}


def progress(*names, steps, seconds=0.25):
    numbers = np.array([[steps] * len(names), [2 * steps] * len(names), [0.5 * steps] * len(names)])
    return Progress(names, (Gain(tuple((n, 0) for n in names), ("m",), numbers),), {"act": seconds})


def run(driver, *each):
    """Steps with these reports; what rode on their outputs."""
    start = len(driver.heard)
    for one in each:
        driver.reports = one
        driver.step()
    return driver.heard[start:]


def test_a_report_rides_on_the_last_output_and_one_in_every_step(driver):
    driver.add("a", 8, tokens=4)
    driver.add("b", 8, tokens=4)
    steps = [progress("a", "b", steps=n) for n in (1, 2, 3)]
    heard = run(driver, reports("a", "b"), *steps)
    assert [[name for name, params in each.items() if params] for each in heard] == [
        ["a"],
        ["a"],
        ["a"],
        ["a", "b"],
    ]
    for step in heard[:3]:
        assert step["a"]["seconds"] == {"act": 0.5 if step is heard[0] else 0.25}
    last = Report.from_transfer_params({"trimtab": heard[3]["b"]})
    assert (last.ticket, last.seconds, last.failed) == ("t-b", None, False)
    assert last.tallies == [Tally(8, 3, {"m": 1.5}, 6)]


def test_on_every_output_of_a_request_that_may_end_in_the_front_end(driver):
    driver.add("a", 8, tokens=5)
    driver.add("s", 8, tokens=5, stop=["halt"])
    heard = run(driver, reports("a", "s"), *(progress("a", "s", steps=n) for n in (1, 2, 3)))
    assert all(each["s"] for each in heard)
    tallies = [Report.from_transfer_params({"trimtab": each["s"]}).tallies for each in heard]
    assert [own[0].completion_tokens for own in tallies] == [0, 1, 2, 3]


def test_now_and_then_on_an_output_of_every_request(driver):
    driver.add("a", 8, tokens=3 * EVERY)
    driver.add("b", 8, tokens=3 * EVERY)
    heard = run(driver, reports("a", "b"), *(progress("a", "b", steps=n) for n in range(1, 40)))
    told = [n for n, each in enumerate(heard, 1) if each["b"]]
    assert told == [EVERY, 2 * EVERY]


def test_plain_neighbours_carry_nothing(driver):
    driver.add("p", 8, tokens=3)
    driver.add("a", 8, tokens=3)
    heard = run(driver, reports("a"), progress("a", steps=1), progress("a", steps=2))
    assert [each["p"] for each in heard] == [None] * 3
    assert [each["a"]["seconds"] for each in heard] == [{"act": 0.5}, {"act": 0.25}, {"act": 0.25}]


def test_seconds_of_a_step_without_outputs_wait_for_the_next(driver):
    driver.add("a", 100, tokens=2)  # more than a step takes
    heard = run(driver, reports("a", seconds=0.5), reports("a", seconds=0.25))
    assert heard[0] == {}
    assert heard[1]["a"]["seconds"] == {"act": 0.75}


def test_a_failure_ends_its_request_alone(driver):
    driver.add("a", 8, tokens=5)
    driver.add("b", 8, tokens=5)
    heard = run(driver, reports("a", "b"), reports("a", "b", failed=["a"]))
    assert heard[1]["a"]["failed"] is True
    assert driver.reasons == {"a": "error"}


def test_a_step_of_plain_requests_is_vllms(driver):
    driver.add("p", 8, tokens=2)
    assert run(driver, None, {}) == [{"p": None}, {"p": None}]
