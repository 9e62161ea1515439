"""Clients with different keys meet in no cached prefix, whichever route they come by."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient


def separate(engine_client: EngineClient, salt: Callable[[str | None], str | None]) -> None:
    """Replace the cache salt of every prompt by what `salt` makes of it.

    Here all routes come together, those that a later vLLM may add, too. Prompts that are no
    objects, such as the pieces of a spoken one, have no salt to replace.
    """
    generate = engine_client.generate

    def separated(prompt: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if isinstance(prompt, dict):
            given = prompt.get("cache_salt")
            made = salt(given)
            if made != given:
                prompt = {**prompt, "cache_salt": made}
        return generate(prompt, *args, **kwargs)

    engine_client.generate = separated
