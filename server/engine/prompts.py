"""Where prompts pass on their way to the engine, tokenised."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.renderers.inputs.preprocess import extract_prompt_len

from server.engine.payload import Payload

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient


def inspect(engine_client: EngineClient, on_prompt: Callable[[str, int], None]) -> None:
    """Call `on_prompt(ticket, length)` for every prompt of a calibrated request.

    What it raises reaches the handler that asked, before the engine hears of the prompt and before
    a stream begins: `generate` is called at once, and runs only when its output is read.
    """
    generate = engine_client.generate

    def inspected(prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        payload = Payload.from_extra_args(sampling_params.extra_args)
        if payload is not None:
            length = extract_prompt_len(engine_client.vllm_config.model_config, prompt)
            on_prompt(payload.ticket, length)
        return generate(prompt, sampling_params, *args, **kwargs)

    engine_client.generate = inspected
