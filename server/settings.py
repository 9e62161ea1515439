"""Trimtab's own serve flags, each also `TRIMTAB_*` in the environment.

Variables, flags and fields have one name: `--default-calibration` is
`TRIMTAB_DEFAULT_CALIBRATION` and `default_calibration`.
"""

from __future__ import annotations

import os
import secrets
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from calibrators.registry import BUILT_IN
from server import flags
from server.flags import PREFIX, add_flag
from server.limits import Limits, add_limit_flags

SALT_KEY = f"{PREFIX}CACHE_SALT_KEY"
# Switches that change how a model thinks, not how much work a template is.
TEMPLATE_KWARGS = ("enable_thinking", "thinking", "reasoning_effort")


@dataclass(frozen=True, slots=True)
class Settings:
    """What the flags of the groups "Calibration", "Access" and "Limits" say.

    Attributes:
        calibrators: names of the methods on offer.
        calibration_profiles: folder of profiles.
        calibration_presets: file of presets.
        default_calibration: `calibration` of requests that say nothing.
        max_calibrations_per_request: longest list a request may send.
        allow_untested_vllm: start with a vLLM this version was not tested with.
        api_key_file: file of API keys, one per line.
        metrics_without_key: whether `/metrics` is open where keys are configured.
        request_log: whether each request is a line of the log.
        allowed_chat_template_kwargs: names a request may use in `chat_template_kwargs`.
        limits: what one request may ask for.
        salt_key: secret of prefix-cache salts; from the environment only, so that it shows in
            no process list.
    """

    calibrators: tuple[str, ...] = BUILT_IN
    calibration_profiles: Path | None = None
    calibration_presets: Path | None = None
    default_calibration: Any = None
    max_calibrations_per_request: int = 2
    allow_untested_vllm: bool = False
    api_key_file: str | None = None
    metrics_without_key: bool = False
    request_log: bool = True
    allowed_chat_template_kwargs: tuple[str, ...] = TEMPLATE_KWARGS
    limits: Limits = field(default_factory=Limits)
    salt_key: str = ""

    @classmethod
    def from_args(cls, args: Namespace) -> Settings:
        """Settings of parsed arguments."""
        given = {f.name: getattr(args, f.name) for f in fields(cls) if hasattr(args, f.name)}
        salt_key = os.environ.get(SALT_KEY) or secrets.token_hex(32)
        return cls(**given, limits=Limits.from_args(args), salt_key=salt_key)


def add_flags(parser: ArgumentParser, environment: Mapping[str, str] = os.environ) -> None:
    """Add the groups of our flags; defaults come from the environment."""
    group = parser.add_argument_group("Calibration", "Attention calibration (Trimtab).")
    add = partial(add_flag, group.add_argument, environment)
    add_calibrators(group.add_argument, environment)
    add("--calibration-profiles", flags.path, None, "Folder of profiles, one JSON file each.")
    add("--calibration-presets", flags.path, None, "TOML file of presets, which name calibrations.")
    add(
        "--default-calibration",
        flags.json_or_name,
        None,
        "Calibration of requests that name none: JSON, or the name of a calibrator or preset.",
    )
    add(
        "--max-calibrations-per-request",
        flags.positive,
        2,
        "Longest list of calibrations a request may send.",
    )
    add(
        "--allow-untested-vllm",
        flags.boolean,
        False,
        "true: start with a vLLM version this Trimtab was not tested with.",
    )
    _add_access(parser, environment)
    add_limit_flags(parser, environment)


def _add_access(parser: ArgumentParser, environment: Mapping[str, str]) -> None:
    group = parser.add_argument_group("Access", "Who may ask, and for what (Trimtab).")
    add = partial(add_flag, group.add_argument, environment)
    add("--api-key-file", str, None, "File of API keys, one per line, # for comments.")
    add("--metrics-without-key", flags.boolean, False, "true: /metrics needs no API key.")
    add("--request-log", flags.boolean, True, "false: no line of log per request.")
    add(
        "--allowed-chat-template-kwargs",
        flags.names,
        TEMPLATE_KWARGS,
        "Names that requests may use in chat_template_kwargs, comma-separated.",
    )


def add_calibrators(
    add_argument: Callable[..., object], environment: Mapping[str, str] = os.environ
) -> None:
    """Add the flag that says which methods are on offer, to a parser or a group of one."""
    text = "Methods on offer, comma-separated names."
    add_flag(add_argument, environment, "--calibrators", flags.names, BUILT_IN, text)


def share_salt_key() -> None:
    """Draw a salt key for this start, unless one is configured, for all API servers to share."""
    os.environ[SALT_KEY] = os.environ.get(SALT_KEY) or secrets.token_hex(32)
