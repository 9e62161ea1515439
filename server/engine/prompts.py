"""Where prompts pass on their way to the engine, tokenised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm.renderers.inputs.preprocess import extract_prompt_len

from calibrators.interface import Prompt
from server.engine import wording
from server.engine.geometry import Geometry, geometry_of
from server.engine.payload import KEY, Payload

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient


def inspect(engine_client: EngineClient, on_prompt: Callable[[str, Geometry], None]) -> None:
    """Call `on_prompt(ticket, geometry)` for every prompt of a calibrated request.

    What it raises reaches the handler that asked, before the engine hears of the prompt and before
    a stream begins: `generate` is called at once, and runs only when its output is read. Images
    and words are looked for where the request wanted them, and travel on with it.
    """
    generate = engine_client.generate

    def inspected(prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        payload = Payload.from_extra_args(sampling_params.extra_args)
        if payload is not None:
            found = wording.current()
            geometry = _geometry(engine_client, prompt, found)
            on_prompt(payload.ticket, geometry)
            if found is not None:
                entry = replace(payload, prompt=geometry.prompt).to_extra_args()
                sampling_params.extra_args = {**sampling_params.extra_args, KEY: entry}
        return generate(prompt, sampling_params, *args, **kwargs)

    engine_client.generate = inspected


def _geometry(engine_client: EngineClient, prompt: Any, found: wording.Wording | None) -> Geometry:  # noqa: ANN401
    if found is None or not isinstance(prompt, dict) or not prompt.get("prompt_token_ids"):
        length = extract_prompt_len(engine_client.vllm_config.model_config, prompt)
        return Geometry(Prompt(length))

    def encode(text: str, special: bool) -> tuple[Sequence[int], Any] | None:
        tokenizer: Any = engine_client.renderer.get_tokenizer()
        if not getattr(tokenizer, "is_fast", False):
            return None
        encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        return encoded["input_ids"], encoded["offset_mapping"]

    return geometry_of(prompt, found.spans, encode)
