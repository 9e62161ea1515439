"""`trimtab serve` with an engine core that answers at once: `python -m tests.reliability.serve`.

On SIGUSR1 the core dies.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import Any

from vllm.v1.engine.core_client import EngineCoreClient

from server import cli
from tests.reliability.core import AnsweringCore


def answering(*args: Any, **kwargs: Any) -> AnsweringCore:
    """In the place of the function that starts an engine core process."""
    core = AnsweringCore()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, core.die)
    return core


if __name__ == "__main__":
    EngineCoreClient.make_async_mp_client = staticmethod(answering)
    sys.exit(cli.main(["serve", *sys.argv[1:]]))
