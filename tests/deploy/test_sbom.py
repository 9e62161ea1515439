"""The list has all that the CPU image installs, as it is locked, or is not written."""

import json
import subprocess
from pathlib import Path

import pytest

from deploy import locks, sbom
from server import __version__


def component(line, package):
    """As cyclonedx-py writes one."""
    digests = [{"alg": "SHA-256", "content": each} for each in package.hashes]
    return {
        "type": "library",
        "bom-ref": f"requirements-L{line}",
        "description": f"requirements line {line}",
        "name": package.name,
        "version": package.version,
        "purl": f"pkg:pypi/{package.name}@{package.version.replace('+', '%2B')}",
        "externalReferences": [{"type": "distribution", "url": "", "hashes": digests}],
    }


@pytest.fixture
def cyclonedx(monkeypatch, tmp_path):
    """Stands for cyclonedx-py: the dictionary says how its answer changes, and has its commands."""
    fake = {"change": json.dumps, "status": 0, "commands": []}

    def run(command, **_):
        fake["commands"].append(command)
        packages = locks.read(Path(command[command.index("requirements") + 1]))
        components = [component(line, each) for line, each in enumerate(packages)]
        root = {"type": "application", "bom-ref": "root-component", "name": "trimtab"}
        answer = {"components": components, "metadata": {"component": root}, "dependencies": []}
        return subprocess.CompletedProcess(command, fake["status"], fake["change"](answer))

    monkeypatch.setattr(sbom.subprocess, "run", run)
    monkeypatch.setattr(sbom.sys, "argv", ["sbom.py", str(tmp_path / "out" / "sbom.json")])
    return fake


def test_the_list_has_what_is_locked(cyclonedx, tmp_path, capsys):
    assert sbom.main() == 0
    bom = json.loads((tmp_path / "out" / "sbom.json").read_text())
    packages = [each for file in (locks.CPU, locks.TORCH) for each in locks.read(file)]
    assert [each["name"] for each in bom["components"]] == [each.name for each in packages]
    assert bom["metadata"]["component"]["version"] == __version__
    references = [each["bom-ref"] for each in bom["components"]]
    assert len(set(references)) == len(packages)
    assert bom["dependencies"][0] == {"ref": "root-component", "dependsOn": references}
    assert references[-1].startswith("pkg:pypi/torch@") and references[-1].endswith("%2Bcpu")
    assert f"{len(packages)} components" in capsys.readouterr().out


def test_each_lock_is_said_to_come_from_its_index(cyclonedx):
    sbom.main()
    commands = cyclonedx["commands"]
    indexes = [command[command.index("--index-url") + 1] for command in commands]
    assert indexes == ["https://pypi.org/simple", "https://download.pytorch.org/whl/cpu"]


def alter(**fields):
    """Changes the first component; None takes a field away."""

    def change(answer):
        first = answer["components"][0]
        kept = {name: value for name, value in (first | fields).items() if value is not None}
        answer["components"][0] = kept
        return json.dumps(answer)

    return change


def rename_one(answer):
    answer["components"][0]["name"] += "-of-others"
    return json.dumps(answer)


def lose_a_hash(answer):
    answer["components"][0]["externalReferences"][0]["hashes"].pop()
    return json.dumps(answer)


def lose_one(answer):
    return json.dumps(answer | {"components": answer["components"][1:]})


def double_one(answer):
    return json.dumps(answer | {"components": [*answer["components"], answer["components"][0]]})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda answer: "", "has no list"),
        (lambda answer: json.dumps(answer | {"components": []}), "0 components for"),
        (lambda answer: json.dumps({"metadata": answer["metadata"]}), "0 components for"),
        (lose_one, "components for"),
        (double_one, "components for"),
        (rename_one, "version, package URL, hashes not as locked"),
        (alter(version=None), "version not as locked"),
        (alter(version="0.1"), "version not as locked"),
        (alter(purl=None), "package URL not as locked"),
        (alter(purl="pkg:pypi/numpy"), "package URL not as locked"),
        (alter(externalReferences=None), "hashes not as locked"),
        (lose_a_hash, "hashes not as locked"),
    ],
)
def test_an_incomplete_list_is_not_written(cyclonedx, tmp_path, capsys, change, told):
    cyclonedx["change"] = change
    assert sbom.main() == 1
    assert not (tmp_path / "out").exists()
    said = capsys.readouterr().err
    assert "no SBOM" in said and told in said


def test_a_tool_that_fails_makes_no_list(cyclonedx, tmp_path, capsys):
    cyclonedx["status"] = 1
    assert sbom.main() == 1
    assert not (tmp_path / "out").exists()
    assert "ended with 1 for requirements.lock" in capsys.readouterr().err
