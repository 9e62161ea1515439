"""Writes what the CPU image installs as CycloneDX JSON: `make sbom`.

Fails, and writes nothing, unless all that is locked is in it with version, hashes and package URL.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deploy import locks
from deploy.cpu.install import CPU_INDEX
from deploy.lock import PYPI
from server import __version__

ROOT = locks.DEPLOY.parent
SOURCES = ((locks.CPU, PYPI), (locks.TORCH, CPU_INDEX))


class IncompleteError(Exception):
    """The list lacks something that the image has."""


def cyclonedx(lock: Path, index: str) -> Any:  # noqa: ANN401 - JSON
    """What cyclonedx-py makes of a lock."""
    # It misses a graph of dependencies, which a lock does not have.
    command = [sys.executable, "-W", "ignore", "-m", "cyclonedx_py", "requirements", str(lock)]
    command += ["--index-url", index, "--pyproject", str(ROOT / "pyproject.toml")]
    command += ["--output-reproducible", "--output-format", "JSON", "--output-file", "-"]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise IncompleteError(f"cyclonedx-py ended with {done.returncode} for {lock.name}")
    try:
        return json.loads(done.stdout)
    except ValueError:
        raise IncompleteError(f"cyclonedx-py has no list of {lock.name}") from None


def merged() -> dict[str, Any]:
    """One list of all locks; everything in it is part of Trimtab."""
    bom, *others = [cyclonedx(lock, index) for lock, index in SOURCES]
    components = [each for part in (bom, *others) for each in part.get("components", [])]
    for each in components:
        # Line numbers, which are not unique over several files, and the hashes over again.
        each["bom-ref"] = each.get("purl", each["bom-ref"])
        each.pop("description", None)
    root = bom["metadata"]["component"]
    root |= {"version": __version__, "purl": f"pkg:pypi/trimtab@{__version__}"}
    references = [each["bom-ref"] for each in components]
    dependencies: list[dict[str, Any]] = [{"ref": root["bom-ref"], "dependsOn": references}]
    dependencies += [{"ref": reference} for reference in references]
    return bom | {"components": components, "dependencies": dependencies}


def hashes(component: dict[str, Any]) -> Iterator[str]:
    for reference in component.get("externalReferences", []):
        for each in reference.get("hashes", []):
            if each["alg"] == "SHA-256":
                yield each["content"]


def check(bom: dict[str, Any], packages: list[locks.Locked]) -> None:
    """Raises IncompleteError unless each package is in the list as it is in the lock."""
    components = {each["name"]: each for each in bom["components"]}
    if len(components) != len(packages) or len(bom["components"]) != len(packages):
        raise IncompleteError(f"{len(components)} components for {len(packages)} packages")
    for package in packages:
        component = components.get(package.name, {})
        purl = f"pkg:pypi/{package.name}@{package.version.replace('+', '%2B')}"
        found = {
            "version": component.get("version") == package.version,
            "package URL": component.get("purl") == purl,
            "hashes": set(hashes(component)) == set(package.hashes),
        }
        if wrong := [name for name, right in found.items() if not right]:
            raise IncompleteError(f"{package.name}: {', '.join(wrong)} not as locked")


def main() -> int:
    parser = argparse.ArgumentParser(description="Write what the CPU image installs.")
    parser.add_argument("file", type=Path, nargs="?", default=ROOT / "out" / "sbom.cdx.json")
    file = parser.parse_args().file
    packages = [package for lock, _ in SOURCES for package in locks.read(lock)]
    try:
        bom = merged()
        check(bom, packages)
    except IncompleteError as error:
        print(f"trimtab: no SBOM: {error}", file=sys.stderr)
        return 1
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(bom, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    print(f"trimtab: {file}: {len(packages)} components")
    return 0


if __name__ == "__main__":
    sys.exit(main())
