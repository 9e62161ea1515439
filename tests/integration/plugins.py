"""Plug-ins of a test's own, installed as anybody's would be: a distribution on the path."""

from __future__ import annotations

import os
from pathlib import Path


def install(folder: Path, module: str, source: str, entry_points: str) -> dict[str, str]:
    """Put a distribution called `module` into `folder`; returns the environment that finds it."""
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)
    path = [str(folder), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, path))}
