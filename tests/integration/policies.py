"""A plug-in with a calibrator per prefill policy, and a record of what the engine schedules.

Its source is installed by tests; it is not imported here.
"""

from __future__ import annotations

import json
import os
from typing import Any, ClassVar, Literal

from calibrators.interface import Prefill
from calibrators.zerotuning import ZeroTuning, ZeroTuningSettings


class WholeSettings(ZeroTuningSettings):
    method: Literal["whole"] = "whole"


class Whole(ZeroTuning):
    """ZeroTuning in the way of a method that looks at later rows."""

    name: ClassVar[str] = "whole"
    title: ClassVar[str] = "Whole"
    causal: ClassVar[bool] = False
    Settings: ClassVar[type] = WholeSettings

    def prefill(self, bound: Any) -> Prefill:
        return Prefill.WHOLE


class SplitSettings(ZeroTuningSettings):
    method: Literal["split"] = "split"


class Split(ZeroTuning):
    """ZeroTuning in the way of a method that needs all before the last row."""

    name: ClassVar[str] = "split"
    title: ClassVar[str] = "Split"
    Settings: ClassVar[type] = SplitSettings

    def prefill(self, bound: Any) -> Prefill:
        return Prefill.SPLIT_LAST


class AcausalSettings(ZeroTuningSettings):
    method: Literal["acausal"] = "acausal"


class Acausal(ZeroTuning):
    """ZeroTuning that shares KV with nobody, in any chunks."""

    name: ClassVar[str] = "acausal"
    title: ClassVar[str] = "Acausal"
    causal: ClassVar[bool] = False
    Settings: ClassVar[type] = AcausalSettings


ENTRY_POINTS = """
[trimtab.calibrators]
whole = policies:Whole
split = policies:Split
acausal = policies:Acausal

[vllm.general_plugins]
record = policies:record
"""


def record() -> None:
    """Have every scheduler of this process write its steps to `$SCHEDULED`, a line each."""
    from vllm.v1.core.sched.scheduler import Scheduler

    schedule = Scheduler.schedule
    # vLLM runs plug-ins more than once.
    if schedule.__module__ == __name__:
        return

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = schedule(self, *args, **kwargs)
        starts = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        starts |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        sizes = output.num_scheduled_tokens
        with open(os.environ["SCHEDULED"], "a") as file:
            line = {name: [starts[name], size] for name, size in sizes.items()}
            file.write(json.dumps(line) + "\n")
        return output

    Scheduler.schedule = recorded
