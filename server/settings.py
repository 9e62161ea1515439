"""Trimtab's own serve flags, each also `TRIMTAB_*` in the environment.

Variables, flags and fields have one name: `--default-calibration` is
`TRIMTAB_DEFAULT_CALIBRATION` and `default_calibration`.
"""

from __future__ import annotations

import json
import os
import secrets
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from calibrators.registry import BUILT_IN
from server.presets import NAME

PREFIX = "TRIMTAB_"
SALT_KEY = "TRIMTAB_CACHE_SALT_KEY"


@dataclass(frozen=True, slots=True)
class Settings:
    """What the flags of the group "Calibration" say.

    Attributes:
        calibrators: names of the methods on offer.
        calibration_profiles: folder of profiles.
        calibration_presets: file of presets.
        default_calibration: `calibration` of requests that say nothing.
        max_calibrations_per_request: longest list a request may send.
        allow_untested_vllm: start with a vLLM this version was not tested with.
        salt_key: secret of prefix-cache salts; from the environment only, so that it shows in
            no process list.
    """

    calibrators: tuple[str, ...] = BUILT_IN
    calibration_profiles: Path | None = None
    calibration_presets: Path | None = None
    default_calibration: Any = None
    max_calibrations_per_request: int = 2
    allow_untested_vllm: bool = False
    salt_key: str = ""

    @classmethod
    def from_args(cls, args: Namespace) -> Settings:
        """Settings of parsed arguments."""
        given = {f.name: getattr(args, f.name) for f in fields(cls) if hasattr(args, f.name)}
        return cls(**given, salt_key=os.environ.get(SALT_KEY) or secrets.token_hex(32))


def add_flags(parser: ArgumentParser, environment: Mapping[str, str] = os.environ) -> None:
    """Add the group "Calibration"; defaults come from the environment."""
    group = parser.add_argument_group("Calibration", "Attention calibration (Trimtab).")
    add = partial(_add, group.add_argument, environment)
    add_calibrators(group.add_argument, environment)
    add("--calibration-profiles", _path, None, "Folder of profiles, one JSON file each.")
    add("--calibration-presets", _path, None, "TOML file of presets: calibrations with a name.")
    add(
        "--default-calibration",
        _json,
        None,
        "Calibration of requests that name none: JSON, or the name of a calibrator or preset.",
    )
    add(
        "--max-calibrations-per-request",
        _positive,
        2,
        "Longest list of calibrations a request may send.",
    )
    add(
        "--allow-untested-vllm",
        _boolean,
        False,
        "true: start with a vLLM version this Trimtab was not tested with.",
    )


def add_calibrators(
    add_argument: Callable[..., object], environment: Mapping[str, str] = os.environ
) -> None:
    """Add the flag that says which methods are on offer, to a parser or a group of one."""
    text = "Methods on offer, comma-separated names."
    _add(add_argument, environment, "--calibrators", _names, BUILT_IN, text)


def _add(
    add_argument: Callable[..., object],
    environment: Mapping[str, str],
    flag: str,
    parse: Callable[[str], Any],
    default: object,
    text: str,
) -> None:
    variable = PREFIX + flag.removeprefix("--").replace("-", "_").upper()
    # argparse runs `type` on defaults that are strings, so both sources share one check.
    add_argument(
        flag,
        type=parse,
        default=environment.get(variable, default),
        help=f"{text} Environment: {variable}.",
    )


def share_salt_key() -> None:
    """Draw a salt key for this start, unless one is configured, for all API servers to share."""
    os.environ[SALT_KEY] = os.environ.get(SALT_KEY) or secrets.token_hex(32)


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        # A bare word is a calibrator's or a preset's name; anything else was meant as JSON.
        if NAME.fullmatch(text):
            return text
        raise ArgumentTypeError(f"not JSON: {text!r}") from None


def _path(text: str) -> Path:
    if not text:
        raise ArgumentTypeError("a path is needed")
    return Path(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"not a positive whole number: {text!r}")
    return int(text)


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ArgumentTypeError(f"true or false is allowed, not {text!r}")
    return text.lower() == "true"
