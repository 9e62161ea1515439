"""vLLM's scheduler, cutting prompts into steps as their calibrations need it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from calibrators.interface import Prefill
from server.engine.facts import step_limit
from server.engine.payload import Payload

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

_POLICY = "calibration_prefill"


class PrefillScheduler(Scheduler):
    """Scheduler that honours prefill policies, and lets nobody wait for long because of them.

    The queue stops at a prompt that has to come whole and finds too few tokens left. Waiting until
    enough running requests have ended could take thousands of steps. So when it is its turn, it
    gets its room at once: running requests share what it leaves of the step. They come first again
    in the step after one that held them back, so that no sequence of whole prompts stops them.
    """

    _spare: int = 0
    _held_back: bool = False

    def add_request(self, request: Request) -> None:
        """Take up a request and its policy."""
        params = request.sampling_params
        payload = Payload.from_extra_args(params.extra_args if params is not None else None)
        if payload is not None:
            setattr(request, _POLICY, payload.prefill)
            # A salt of its own is not enough: the copies of n > 1 share it.
            request.skip_reading_prefix_cache |= not payload.shareable
        super().add_request(request)
        if not self._can_come_whole(request):
            # Admission refuses these. One that got past it would stop the queue for ever; this set
            # is the one vLLM ends requests from whose grammar does not compile.
            self.grammar_compile_error_reqs.add(request.request_id)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Schedule a step, with room for the whole prompt whose turn it is."""
        first = None if self._held_back or throttle_prefills else self._whole_prompt_in_line()
        self._held_back = False
        self._spare = self.max_num_scheduled_tokens - (first.num_prompt_tokens if first else 0)
        return super().schedule(throttle_prefills)

    def _whole_prompt_in_line(self) -> Request | None:
        """The request next in line if it comes whole and lacks nothing but tokens."""
        taken = len(self.running) + self.num_waiting_for_streaming_input
        if taken >= self.max_num_active_reqs:
            return None
        blocked = self._is_blocked_waiting_status
        first = next((each for each in self.waiting if not blocked(each.status)), None)
        if first is None or _policy(first) is not Prefill.WHOLE or not self._can_come_whole(first):
            return None
        # Taking blocks that running prompts are about to need would end in a preemption.
        needed = self._request_remaining_blocks(first) + self._inflight_prefill_reserved_blocks()
        return first if needed <= self.kv_cache_manager.block_pool.get_num_free_blocks() else None

    def _can_come_whole(self, request: Request) -> bool:
        limit = step_limit(self.vllm_config).tokens
        return _policy(request) is not Prefill.WHOLE or request.num_prompt_tokens <= limit

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """vLLM's last word on the size of every chunk; 0 leaves the request out of the step."""
        offered = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        size = chunk(_policy(request), request.num_prompt_tokens, num_computed_tokens, offered)
        if request.status != RequestStatus.RUNNING:
            return size
        if size > self._spare:
            self._held_back = True
            size = self._spare
        self._spare -= size
        return size


def chunk(policy: Prefill, prompt: int, computed: int, offered: int) -> int:
    """Tokens of the next chunk of a request; 0 for "not in this step".

    Only positions decide. After a preemption the prompt comes again with generated tokens behind
    it, which may share its last chunk.

    Args:
        policy: of the request.
        prompt: number of prompt tokens.
        computed: positions below this are done.
        offered: tokens the step has left for this request.
    """
    if policy is Prefill.WHOLE:
        return offered if computed + offered >= prompt else 0
    if policy is Prefill.SPLIT_LAST and computed < prompt - 1:
        return min(offered, prompt - 1 - computed)
    return offered


def _policy(request: Request) -> Prefill:
    policy: Prefill = getattr(request, _POLICY, Prefill.ANY)
    return policy
