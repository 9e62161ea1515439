"""What the lock files say, and where they are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

DEPLOY = Path(__file__).resolve().parent
CPU = DEPLOY / "cpu" / "requirements.lock"
# torch's CPU build is on an index of its own.
TORCH = DEPLOY / "cpu" / "torch.lock"
CUDA = DEPLOY / "cuda" / "requirements.lock"

ENTRY = re.compile(r"([a-z0-9][a-z0-9.-]*)==([^\s;\\]+)((?: --hash=sha256:[0-9a-f]{64})+)")


class LockError(Exception):
    """A lock file says something else than names, versions and hashes."""


@dataclass(frozen=True)
class Locked:
    """One package: everything that pip may install under its name."""

    name: str
    version: str
    hashes: tuple[str, ...]


def read(lock: Path) -> list[Locked]:
    """The packages of a lock file.

    Raises:
        LockError: a line is no package, has no exact version or no hash, or there is none.
    """
    text = lock.read_text(encoding="utf-8")
    lines = re.sub(r"\s*\\\n\s*", " ", text).splitlines()
    packages = [_read(lock, line) for line in lines if line and not line.startswith("#")]
    if not packages:
        raise LockError(f"{lock}: no packages")
    return packages


def _read(lock: Path, line: str) -> Locked:
    found = ENTRY.fullmatch(line)
    if not found:
        raise LockError(f"{lock}: not a package with version and hashes: {line[:80]}")
    name, version, hashes = found.groups()
    return Locked(name, version, tuple(hashes.replace(" --hash=sha256:", " ").split()))
