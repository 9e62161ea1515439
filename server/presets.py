"""Presets: calibrations that the operator has named, from one TOML file.

[presets.careful]
description = "less weight on the first token"
method = "zerotuning"
gamma = 0.6

[presets.both]
calibrations = [{ method = "act" }, { method = "vhr", alpha = 1.5 }]
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibrators.settings import MAX_NAME

NAME = re.compile(rf"[a-z0-9][a-z0-9._-]{{0,{MAX_NAME - 1}}}")
# What "calibration" may say that is no preset.
RESERVED = frozenset({"none"})
MAX_DESCRIPTION = 1000


class PresetError(Exception):
    """A preset that cannot be offered.

    Args:
        name: of the preset, empty for the file as a whole.
        message: the rule, the value and what is allowed.
    """

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"preset {name!r}: {message}" if name else message)


@dataclass(frozen=True, slots=True)
class Preset:
    """A calibration with a name.

    Attributes:
        name: what requests call it.
        calibration: an object or a list of objects, as a request would send it.
        description: for people.
    """

    name: str
    calibration: object
    description: str = ""


def read(path: Path) -> dict[str, Preset]:
    """The presets of a file, in its order.

    Raises:
        PresetError: it cannot be read, or something in it is no preset.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PresetError("", f"{path.name} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise PresetError("", f"{path.name} is not TOML: {error}") from None
    stray = sorted(content.keys() - {"presets"})
    if stray:
        raise PresetError("", f"{path.name}: only tables [presets.NAME] go here, not {stray[0]!r}")
    tables = content.get("presets", {})
    if not isinstance(tables, dict):
        raise PresetError("", f"{path.name}: presets must be tables [presets.NAME]")
    return {name: _preset(name, table) for name, table in tables.items()}


def _preset(name: str, table: object) -> Preset:
    if not NAME.fullmatch(name):
        raise PresetError(name, f"a name must match {NAME.pattern}")
    if name in RESERVED:
        raise PresetError(name, "the name is reserved")
    if not isinstance(table, Mapping):
        raise PresetError(name, "it must be a table")
    body = dict(table)
    description = body.pop("description", "")
    if not isinstance(description, str) or len(description) > MAX_DESCRIPTION:
        raise PresetError(name, f"description must be a text of at most {MAX_DESCRIPTION} letters")
    return Preset(name, _calibration(name, body), description)


def _calibration(name: str, body: dict[str, Any]) -> object:
    if "calibrations" not in body:
        return body
    entries = body.pop("calibrations")
    if body:
        raise PresetError(name, f"{min(body)} goes into an entry of calibrations, not beside it")
    if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
        raise PresetError(name, "calibrations must be a list of calibration objects")
    return entries
