"""How much one request, or one connection, may ask for.

The one table: flags, checks and the page docs/limits.md are made from it.
"""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any

from server.flags import add_flag, positive, seconds


def _limit(default: float, text: str) -> Any:  # noqa: ANN401 - a field, to the type checker a value
    return field(default=default, metadata={"text": text})


@dataclass(frozen=True, slots=True)
class Limits:
    """Upper bounds, each inclusive, each the flag of its name."""

    max_body_bytes: int = _limit(20_000_000, "Bytes of a request body, declared or chunked.")
    header_timeout: float = _limit(10.0, "Seconds until a request's headers are complete.")
    body_timeout: float = _limit(60.0, "Seconds from there until its body is complete.")
    request_timeout: float = _limit(
        1800.0, "Seconds from complete headers to the end of the answer; then 504."
    )
    max_queued_requests: int = _limit(
        256, "Requests that wait while others run; more get 503 with Retry-After."
    )
    max_n: int = _limit(16, "Choices per prompt: n, best_of.")
    max_prompts: int = _limit(128, "Prompts, or conversations, in one request.")
    max_sequences: int = _limit(256, "Prompts or conversations of one request, times n.")
    max_logprobs_per_token: int = _limit(
        20, "Alternatives per token: logprobs, top_logprobs, prompt_logprobs."
    )
    max_stop_strings: int = _limit(4, "Entries of stop, stop_sequences.")
    max_stop_chars: int = _limit(256, "Characters per entry of stop, stop_sequences, bad_words.")
    max_stop_token_ids: int = _limit(64, "Entries of stop_token_ids.")
    max_allowed_token_ids: int = _limit(4096, "Entries of allowed_token_ids.")
    max_bad_words: int = _limit(128, "Entries of bad_words.")
    max_logit_bias: int = _limit(1024, "Entries of logit_bias.")
    max_tools: int = _limit(128, "Entries of tools, functions.")
    max_schema_chars: int = _limit(
        65_536, "Characters, as JSON, of response_format, structured_outputs, tools each."
    )
    max_messages: int = _limit(2048, "Messages of one request: messages, input.")
    max_media: int = _limit(16, "Images, videos and sounds of one request.")
    max_cache_salt_chars: int = _limit(128, "Characters of cache_salt.")

    def __post_init__(self) -> None:
        for each in fields(self):
            if not getattr(self, each.name) > 0:
                raise ValueError(f"{each.name} has to be positive")

    @classmethod
    def from_args(cls, args: Namespace) -> Limits:
        """Limits of parsed arguments."""
        given = {f.name: getattr(args, f.name) for f in fields(cls) if hasattr(args, f.name)}
        return cls(**given)


def flag_of(name: str) -> str:
    """The flag that sets a limit."""
    return "--" + name.replace("_", "-")


def add_limit_flags(parser: ArgumentParser, environment: Mapping[str, str] = os.environ) -> None:
    """Add the group "Limits"; defaults come from the environment."""
    group = parser.add_argument_group("Limits", "What one request may ask for (Trimtab).")
    for each in fields(Limits):
        text = f"{each.metadata['text']} Default: {each.default}."
        add_flag(
            group.add_argument, environment, flag_of(each.name), _parser(each), each.default, text
        )


def table() -> str:
    """The limits as a table in Markdown."""
    lines = ["| flag | default | bounds |", "|---|---|---|"]
    for each in fields(Limits):
        lines.append(f"| `{flag_of(each.name)}` | {each.default:,} | {each.metadata['text']} |")
    return "\n".join(lines)


def _parser(limit: Field[Any]) -> Callable[[str], float]:
    return seconds if isinstance(limit.default, float) else positive
