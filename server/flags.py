"""How a flag is declared: one name for the flag, its `TRIMTAB_*` variable and its field."""

from __future__ import annotations

import json
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from server.presets import NAME

PREFIX = "TRIMTAB_"


def add_flag(
    add_argument: Callable[..., object],
    environment: Mapping[str, str],
    flag: str,
    parse: Callable[[str], Any],
    default: object,
    text: str,
) -> None:
    """Add a flag to a parser or a group of one; its default comes from the environment."""
    variable = PREFIX + flag.removeprefix("--").replace("-", "_").upper()
    # argparse runs `type` on defaults that are strings, so both sources share one check.
    add_argument(
        flag,
        type=parse,
        default=environment.get(variable, default),
        help=f"{text} Environment: {variable}.",
    )


def names(text: str) -> tuple[str, ...]:
    """Names between commas, each once."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def json_or_name(text: str) -> object:
    """JSON, or a bare word."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        # A bare word is a calibrator's or a preset's name; anything else was meant as JSON.
        if NAME.fullmatch(text):
            return text
        raise ArgumentTypeError(f"not JSON: {text!r}") from None


def path(text: str) -> Path:
    """A path; the empty one is a mistake."""
    if not text:
        raise ArgumentTypeError("a path is needed")
    return Path(text)


def positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"not a positive whole number: {text!r}")
    return int(text)


def whole(text: str) -> int:
    """A whole number from 0."""
    if not text.isdecimal():
        raise ArgumentTypeError(f"not a whole number: {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """A time above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not isfinite(value) or value <= 0:
        raise ArgumentTypeError(f"not a positive number of seconds: {text!r}")
    return value


def boolean(text: str) -> bool:
    """`true` or `false`."""
    if text.lower() not in ("true", "false"):
        raise ArgumentTypeError(f"true or false is allowed, not {text!r}")
    return text.lower() == "true"
