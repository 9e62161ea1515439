"""Text passes in the front end: run before their requests, in the same engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias

from vllm.exceptions import GenerationError
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams

from server.engine.payload import KEY, Payload, Report
from server.engine.text_pass import OUTPUTS, text_pass

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

Generate: TypeAlias = Callable[..., Any]
# Of the options of a request, what says where and when it runs.
SHARED = frozenset({"lora_request", "priority", "data_parallel_rank"})


class Preludes:
    """Requests whose prompt runs without its images first.

    A request that is aborted takes its text pass with it; one whose text pass fails, fails.
    """

    def __init__(self) -> None:
        self._seen: dict[str, Mapping[str, str]] = {}

    def __len__(self) -> int:
        return len(self._seen)

    def take(self, report: Report) -> bool:
        """Take a report that is of a text pass; whether it is."""
        if report.ticket not in self._seen:
            return False
        if not report.failed:
            (tally,) = report.tallies
            self._seen[report.ticket] = tally.details.get(OUTPUTS, {})
        return True

    async def generate(
        self,
        generate: Generate,
        payload: Payload,
        prompt: Any,  # noqa: ANN401 - vLLM's input, a dict
        sampling_params: SamplingParams,
        request_id: str,
        **options: Any,  # noqa: ANN401
    ) -> AsyncIterator[Any]:
        """Outputs of the request, when its text pass is done."""
        shared = {name: value for name, value in options.items() if name in SHARED}
        outputs = await self._run(generate, payload, prompt, f"{request_id}-text", shared)
        given = sampling_params.extra_args or {}
        entry = {**given[KEY], "text_outputs": outputs}
        sampling_params.extra_args = {**given, KEY: entry}
        async with aclosing(generate(prompt, sampling_params, request_id, **options)) as answered:
            async for output in answered:
                yield output

    async def _run(
        self,
        generate: Generate,
        payload: Payload,
        prompt: Mapping[str, Any],
        request_id: str,
        options: Mapping[str, Any],
    ) -> Mapping[str, str]:
        """What the text pass of a prompt saw, by layer.

        Raises:
            GenerationError: it failed.
        """
        ticket = f"{payload.ticket}-text"
        own = Payload(ticket, (text_pass(payload.text_layers),))
        params = SamplingParams(
            max_tokens=1,
            temperature=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={KEY: own.to_extra_args()},
        )
        self._seen[ticket] = {}
        try:
            text = without_images(prompt)
            async with aclosing(generate(text, params, request_id, **options)) as outputs:
                async for _ in outputs:
                    pass
            seen = self._seen[ticket]
        finally:
            del self._seen[ticket]
        if set(seen) != set(map(str, payload.text_layers)):
            raise GenerationError("the prompt could not be run without its images")
        return seen


def without_images(prompt: Mapping[str, Any]) -> Any:  # noqa: ANN401 - vLLM's input, a dict
    """A prompt without the tokens that stand for images, as isolated as the prompt itself."""
    tokens = prompt["prompt_token_ids"]
    of_images = {
        position
        for span in chain.from_iterable(prompt.get("mm_placeholders", {}).values())
        for position in range(span.offset, span.offset + span.length)
    }
    text = [token for position, token in enumerate(tokens) if position not in of_images]
    return tokens_input(text, cache_salt=prompt.get("cache_salt"))


def precede(engine_client: EngineClient, preludes: Preludes) -> None:
    """Have the engine run text passes before the requests that need them."""
    generate = engine_client.generate

    def preceded(prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        payload = Payload.from_extra_args(sampling_params.extra_args)
        if payload is None or not payload.text_layers:
            return generate(prompt, sampling_params, *args, **kwargs)
        return preludes.generate(generate, payload, prompt, sampling_params, *args, **kwargs)

    engine_client.generate = preceded
