"""What stands in for vLLM's engine core process: it answers at once and has no model.

Everything in front of it is real: `trimtab serve`, its flags, HTTP, routes and middleware, vLLM's
handlers, chat templates, tokenizer, input and output processors. What it leaves out is scheduling,
the cache, grammars and the forward pass.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.outputs import LogprobsLists, LogprobsTensors

from server.engine.payload import KEY, Payload, Report, Tally

# Tokens of a long answer; each comes as an output of its own, as from a real engine.
LONGEST = 4
# Outputs of a request that is held: none, until it is aborted or the core is gone.
HELD = 424242
# All tokens of a request that is paced, one at a time.
PACED, PACE_SECONDS = 434343, 0.05


class AnsweringCore:
    """In the place of `AsyncMPClient`, with what the front end calls of it.

    A request with `seed` = `HELD` gets no answer, one with `PACED` gets it bit by bit. Told
    to stop, it has some time for what it was asked, as vLLM's has.
    """

    def __init__(self) -> None:
        self.engine_ranks_managed = [0]
        self.resources = SimpleNamespace(engine_dead=False, engine_manager=self)
        self._running: dict[str, asyncio.Task[None] | None] = {}
        self._outputs: asyncio.Queue[EngineCoreOutputs | None] = asyncio.Queue()

    def __getattr__(self, name: str) -> Any:
        """Every other call of the front end is a question that needs no answer."""
        if not name.endswith("_async"):
            raise AttributeError(name)
        return _unanswered

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        return ("generate",)

    async def collective_rpc_async(self, method: str, *args: Any) -> list[dict[str, bool]]:
        return [{"ready": True}]

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        if self.resources.engine_dead:
            raise EngineDeadError()
        seed = getattr(request.sampling_params, "seed", None)
        if seed == HELD:
            self._running[request.request_id] = None
        elif seed == PACED:
            self._running[request.request_id] = asyncio.create_task(self._answer_slowly(request))
        elif request.sampling_params is not None:
            for output in _outputs(request, LONGEST):
                self._outputs.put_nowait(output)

    async def _answer_slowly(self, request: EngineCoreRequest) -> None:
        for output in _outputs(request, sys.maxsize):
            await asyncio.sleep(PACE_SECONDS)
            self._outputs.put_nowait(output)
        del self._running[request.request_id]

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            task = self._running.pop(request_id, None)
            if task is not None:
                task.cancel()

    async def get_output_async(self) -> EngineCoreOutputs:
        outputs = await self._outputs.get()
        if outputs is None:
            raise EngineDeadError()
        return outputs

    def get_kv_event_sources(self) -> dict[int, Any]:
        return {}

    def die(self) -> None:
        """End as a core process that is killed does."""
        self.resources.engine_dead = True
        self._outputs.put_nowait(None)

    def shutdown(self, timeout: float | None = None) -> None:
        """End when nothing runs, or time is up. What runs then is never heard of again."""
        deadline = time.monotonic() + (timeout or 0)
        while self._running and time.monotonic() < deadline:
            time.sleep(PACE_SECONDS)
        self.resources.engine_dead = True


async def _unanswered(*args: Any, **kwargs: Any) -> None:
    return None


def _outputs(request: EngineCoreRequest, longest: int) -> Iterator[EngineCoreOutputs]:
    count = min(request.sampling_params.max_tokens or 1, longest)
    for position in range(count):
        yield _output(request, position, last=position == count - 1)


def _output(request: EngineCoreRequest, position: int, *, last: bool) -> EngineCoreOutputs:
    params, prompt = request.sampling_params, request.prompt_token_ids or [0]
    output = EngineCoreOutput(
        request.request_id,
        [prompt[position % len(prompt)]],
        finish_reason=FinishReason.LENGTH if last else None,
        kv_transfer_params=_report(params.extra_args, len(prompt), position),
    )
    if params.logprobs is not None:
        output.new_logprobs = _logprobs(output.new_token_ids[0], _width(params.logprobs))
    if params.prompt_logprobs is not None and position == 0:
        output.new_prompt_logprobs_tensors = _prompt_logprobs(
            prompt[1:], _width(params.prompt_logprobs)
        )
    return EngineCoreOutputs(outputs=[output])


def _report(extra_args: dict[str, Any] | None, length: int, position: int) -> dict[str, Any] | None:
    payload = Payload.from_extra_args(extra_args)
    if payload is None:
        return None
    tallies = [Tally(length, position) for _ in payload.calibrations]
    return {KEY: Report(payload.ticket, tallies).to_transfer_params()}


def _width(asked: int) -> int:
    return max(asked, 0) + 1


def _logprobs(sampled: int, width: int) -> LogprobsLists:
    ids = np.arange(width, dtype=np.int32)[None]
    # The sampled token comes first, as from vLLM's sampler.
    ids[0, 0] = sampled
    return LogprobsLists(ids, np.full(ids.shape, -1.0, np.float32), np.zeros(1, np.int32))


def _prompt_logprobs(targets: list[int], width: int) -> LogprobsTensors:
    ids = torch.arange(width).repeat(len(targets), 1)
    ids[:, 0] = torch.tensor(targets, dtype=ids.dtype)
    return LogprobsTensors(ids, torch.full(ids.shape, -1.0), torch.zeros(len(targets)).long())
