"""What happens to requests, and to the process, when the engine ends."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import pytest
from vllm.exceptions import GracefulHTTPError

from server.engine.ending import CUT_SHORT, EngineDied, on_shutdown


class FakeEngine:
    """An engine client that is shut down.

    Args:
        manager: of its engine processes, None where another process has them.
        pending: how many requests still run, look by look.
        errored: whether the engine is gone.
    """

    def __init__(self, manager="ours", pending=(), errored=False):
        self.engine_core = SimpleNamespace(resources=SimpleNamespace(engine_manager=manager))
        self.output_processor = SimpleNamespace(propagate_error=self._fail)
        self.pending = list(pending)
        self.errored = errored
        self.calls = []

    def _fail(self, error):
        self.calls.append(error)

    def get_num_unfinished_requests(self):
        return self.pending.pop(0)

    def shutdown(self, timeout=None):
        self.calls.append(timeout)
        # As vLLM's does, whatever was the matter before.
        self.errored = True
        return "down"


def shut_down(engine, callback=lambda seconds: None, times=1, **options):
    """Shut an engine down in a thread, as the launcher does; what `shutdown` gave each time."""

    async def run():
        on_shutdown(engine, callback)
        results = [await asyncio.to_thread(engine.shutdown, **options) for _ in range(times)]
        await asyncio.sleep(0)
        return results

    return asyncio.run(run())


def test_shutdown_is_announced_first():
    engine = FakeEngine()
    said = shut_down(engine, lambda seconds: engine.calls.append(f"announced {seconds}"), timeout=2)
    assert said == ["down"]
    assert engine.calls[:2] == ["announced 2", pytest.approx(2, abs=0.5)]


def test_what_the_announcement_takes_is_taken_off():
    engine = FakeEngine()
    shut_down(engine, lambda seconds: time.sleep(0.02), timeout=0.01)
    assert engine.calls[0] == 0


def test_one_api_server_of_several_waits_for_its_requests():
    engine = FakeEngine(manager=None, pending=[2, 1, 0])
    shut_down(engine, lambda seconds: engine.calls.append("announced"), timeout=60)
    assert engine.pending == []
    assert engine.calls[:2] == ["announced", pytest.approx(60, abs=5)]


@pytest.mark.parametrize("timeout", [0, None])
def test_without_time_to_drain_it_does_not_wait(timeout):
    engine = FakeEngine(manager=None, pending=[1, 1])
    shut_down(engine, timeout=timeout)
    assert engine.pending == [1]
    assert engine.calls[0] == timeout


def test_requests_that_are_left_end_with_an_error_once_the_engine_is_gone():
    engine = FakeEngine()
    shut_down(engine, timeout=1)
    error = engine.calls[1]
    assert isinstance(error, GracefulHTTPError)
    assert (error.http_status, error.message) == (503, CUT_SHORT)


def test_an_engine_that_died_is_told_from_one_that_was_stopped():
    engine = FakeEngine(errored=True)
    with pytest.raises(EngineDied, match="died"):
        shut_down(engine, timeout=1)
    assert engine.calls[0] == pytest.approx(1, abs=0.5)


def test_shutting_down_twice_is_no_death():
    assert shut_down(FakeEngine(), times=2) == ["down", "down"]


def test_after_the_loop_is_closed_there_is_nobody_left_to_tell():
    engine = FakeEngine()

    async def prepare():
        on_shutdown(engine, lambda seconds: None)

    asyncio.run(prepare())
    assert engine.shutdown() == "down"
    assert engine.calls == [None]
