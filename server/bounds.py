"""Checks of a request's body against `Limits`, before anything reaches the engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from math import inf, isfinite
from typing import Any

from server.errors import ApiError
from server.limits import Limits, flag_of
from server.middleware.request_id import SANE

LIMIT_EXCEEDED = "limit_exceeded"
# Sampling parameters may lie one level down, as in vLLM's token-in-token-out route.
NESTED = "sampling_params"

# Fields that are numbers. pydantic makes numbers of strings, "NaN" and "Infinity" among them.
NUMBERS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "length_penalty",
    "max_tokens",
    "max_completion_tokens",
    "min_tokens",
    "seed",
    "n",
    "best_of",
    "logprobs",
    "top_logprobs",
    "prompt_logprobs",
)
MEDIA = frozenset(
    {"image", "image_url", "input_image", "image_pil", "video", "video_url", "input_video"}
    | {"audio", "audio_url", "input_audio"}
)
# Digits of a number that a message repeats.
_SHOWN = 20
# Arguments of a tool call are the client's own data, whatever they look like.
_TOOL_CALL = "tool_use"


@dataclass(frozen=True, slots=True)
class Rule:
    """One limit on some fields.

    Attributes:
        limit: its name in `Limits`.
        fields: that it bounds.
        measure: of a value; None where there is nothing to bound.
        says: what the message says of the measure.
    """

    limit: str
    fields: tuple[str, ...]
    measure: Callable[[Any], float | None]
    says: str


def number(value: object) -> float | None:
    """The number a value would be taken for. Negative ones mean "all" to some fields."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if not isinstance(value, int | float):
        return None
    return value if value >= 0 else inf


def entries(value: object) -> int | None:
    """Number of entries; a string is one."""
    return len(value) if isinstance(value, list | dict) else None


def prompts(value: object) -> int | None:
    """Number of prompts; a list of token ids is one."""
    listed = isinstance(value, list) and any(isinstance(each, str | list | dict) for each in value)
    return entries(value) if listed else None


def conversations(value: object) -> int | None:
    """Number of conversations, where there are several."""
    return sum(isinstance(each, list) for each in value) if isinstance(value, list) else None


def messages(value: object) -> int | None:
    """Number of messages over all conversations."""
    if not isinstance(value, list):
        return None
    return sum(len(each) if isinstance(each, list) else 1 for each in value)


def longest(value: object) -> int | None:
    """Characters of the longest of some strings."""
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list):
        return None
    return max((len(each) for each in found if isinstance(each, str)), default=0)


def characters(value: object) -> int | None:
    """Characters of a string."""
    return len(value) if isinstance(value, str) else None


def written(value: object) -> int | None:
    """Characters of a value as JSON."""
    return None if value is None else len(json.dumps(value, ensure_ascii=False))


def media(value: object) -> int:
    """Images, videos and sounds in the content of messages."""
    return sum(_is_media(part) for part in parts(value))


def parts(value: object) -> Iterator[Mapping[str, Any]]:
    """Every object within messages, themselves included."""
    pending = [value]
    while pending:
        each = pending.pop()
        if isinstance(each, dict):
            yield each
            if each.get("type") != _TOOL_CALL:
                pending.extend(each.values())
        elif isinstance(each, list):
            pending.extend(each)


def _is_media(part: Mapping[str, Any]) -> bool:
    kind = part.get("type")
    return kind in MEDIA if isinstance(kind, str) else not MEDIA.isdisjoint(part)


RULES = (
    Rule("max_n", ("n", "best_of"), number, "is {}"),
    Rule("max_prompts", ("prompt", "prompts"), prompts, "has {} entries"),
    Rule("max_prompts", ("messages",), conversations, "has {} conversations"),
    Rule(
        "max_logprobs_per_token", ("logprobs", "top_logprobs", "prompt_logprobs"), number, "is {}"
    ),
    Rule("max_stop_strings", ("stop", "stop_sequences"), entries, "has {} entries"),
    Rule(
        "max_stop_chars",
        ("stop", "stop_sequences", "bad_words"),
        longest,
        "has an entry of {} characters",
    ),
    Rule("max_stop_token_ids", ("stop_token_ids",), entries, "has {} entries"),
    Rule("max_allowed_token_ids", ("allowed_token_ids",), entries, "has {} entries"),
    Rule("max_bad_words", ("bad_words",), entries, "has {} entries"),
    Rule("max_logit_bias", ("logit_bias",), entries, "has {} entries"),
    Rule("max_tools", ("tools", "functions"), entries, "has {} entries"),
    Rule(
        "max_schema_chars",
        ("response_format", "structured_outputs", "tools", "functions"),
        written,
        "is {} characters long as JSON",
    ),
    Rule("max_messages", ("messages", "input"), messages, "has {} messages"),
    Rule("max_media", ("messages", "input"), media, "has {} images, videos and sounds"),
    Rule("max_cache_salt_chars", ("cache_salt",), characters, "has {} characters"),
)


def check(body: Mapping[str, Any], limits: Limits) -> None:
    """Refuse what goes beyond a limit.

    Raises:
        ApiError: 400; names field, value and limit.
    """
    _check_id(body.get("request_id"))
    for where, fields in _levels(body):
        for name in (*NUMBERS, "logit_bias"):
            _check_number(where + name, fields.get(name))
        for rule in RULES:
            _check_rule(rule, where, fields, limits)
    _check_sequences(body, limits.max_sequences)


def _levels(body: Mapping[str, Any]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    yield "", body
    if isinstance(nested := body.get(NESTED), dict):
        yield f"{NESTED}.", nested


def _check_rule(rule: Rule, where: str, fields: Mapping[str, Any], limits: Limits) -> None:
    allowed = getattr(limits, rule.limit)
    for name in rule.fields:
        found = rule.measure(fields[name]) if name in fields else None
        if found is not None and found > allowed:
            counted = rule.measure is not number
            shown = str(found if counted else fields[name])[:_SHOWN]
            raise ApiError(
                HTTPStatus.BAD_REQUEST,
                f"{where}{name} {rule.says.format(shown)}; "
                f"{'at most' if counted else '0 to'} {allowed} are allowed ({flag_of(rule.limit)})",
                param=where + name,
                code=LIMIT_EXCEEDED,
            )


def _check_sequences(body: Mapping[str, Any], allowed: int) -> None:
    choices = max(number(body.get(name)) or 1 for name in ("n", "best_of"))
    lists = (prompts(body.get("prompt")), conversations(body.get("messages")))
    asked = max(each or 1 for each in lists)
    if choices * asked > allowed:
        raise ApiError(
            HTTPStatus.BAD_REQUEST,
            f"{asked} prompts with {choices:g} choices each are {choices * asked:g} sequences; "
            f"at most {allowed} are allowed ({flag_of('max_sequences')})",
            param="n",
            code=LIMIT_EXCEEDED,
        )


def _check_id(value: object) -> None:
    # It goes into logs, and into a header of the answer.
    if isinstance(value, str) and not SANE.fullmatch(value):
        raise ApiError(
            HTTPStatus.BAD_REQUEST,
            "request_id is not 1 to 128 letters, digits, dots, hyphens and underscores",
            param="request_id",
            code="invalid_request",
        )


def _check_number(name: str, value: object) -> None:
    values = value.values() if isinstance(value, dict) else (value,)
    for each in values:
        if isinstance(each, str) and not _finite(each):
            raise ApiError(
                HTTPStatus.BAD_REQUEST,
                f"{name} is no finite number",
                param=name,
                code="invalid_request",
            )


def _finite(text: str) -> bool:
    try:
        return isfinite(float(text))
    except ValueError:
        # Not a number at all: for the route to say.
        return True
