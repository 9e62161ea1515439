"""A plug-in: the engine takes its time while the file `$SLOW` is there.

Its source is installed by tests; only the names of its entry points are imported here.
"""

from __future__ import annotations

import os
import time
from typing import Any

# Between two steps.
SECONDS = 1.0

ENTRY_POINTS = """
[vllm.general_plugins]
slow = slow:register
"""


def register() -> None:
    """Have every scheduler of this process look for the file before each step."""
    from vllm.v1.core.sched.scheduler import Scheduler

    schedule = Scheduler.schedule
    # vLLM runs plug-ins more than once.
    if schedule.__module__ == __name__:
        return

    def slowed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if os.path.exists(os.environ["SLOW"]):
            time.sleep(SECONDS)
        return schedule(self, *args, **kwargs)

    Scheduler.schedule = slowed
