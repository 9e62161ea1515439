"""How the engine ends: announced, waited for, and told to whoever still hopes for an answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from vllm.exceptions import GracefulHTTPError

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

CUT_SHORT = "the server has shut down before this request was done"
POLL_SECONDS = 0.05


class EngineDied(Exception):
    """The engine ended without having been told to."""


def on_shutdown(engine_client: EngineClient, callback: Callable[[float], None]) -> None:
    """Call `callback(seconds)` when the server begins to shut the engine down, before it drains.

    What it takes of the seconds that running requests are given is taken off them. Requests that
    are not done when the engine is gone end with an error then: vLLM would let them wait for ever,
    and the process with them.

    vLLM drains where it stops the engine. One API server of several does not: it would hang up
    on its requests at once, so it waits for them here.

    The engine client's `shutdown` raises `EngineDied` if the engine was gone before. vLLM would
    end with status 0, as after a signal, and whoever restarts what fails would not restart it.
    """
    shutdown = engine_client.shutdown
    loop = asyncio.get_running_loop()
    called = False

    def announce(*args: Any, timeout: float | None = None, **kwargs: Any) -> Any:  # noqa: ANN401
        nonlocal called
        died, called = engine_client.errored and not called, True
        started = time.monotonic()
        callback(timeout or 0)
        if timeout is not None:
            timeout = max(timeout - (time.monotonic() - started), 0)
        if engine_client.engine_core.resources.engine_manager is None:
            _wait_for_requests(engine_client, timeout or 0)
        result = shutdown(*args, timeout=timeout, **kwargs)
        if not loop.is_closed():
            loop.call_soon_threadsafe(_end_requests, engine_client)
        if died:
            raise EngineDied("the engine has died; what it said last is above")
        return result

    engine_client.shutdown = announce


def _wait_for_requests(engine_client: EngineClient, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while engine_client.get_num_unfinished_requests() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def _end_requests(engine_client: EngineClient) -> None:
    error = GracefulHTTPError(CUT_SHORT, HTTPStatus.SERVICE_UNAVAILABLE)
    engine_client.output_processor.propagate_error(error)
