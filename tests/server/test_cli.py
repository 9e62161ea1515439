import os
import re
import subprocess
import sys

import pytest

from calibrators.registry import BUILT_IN
from server import __version__, cli, doctor, models
from tests.integration import plugins


def run(*argv):
    """Run in a fresh process; also returns which of the slow packages were imported."""
    code = (
        "import sys\n"
        "from server.cli import main\n"
        "try:\n"
        "    sys.exit(main(sys.argv[1:]))\n"
        "finally:\n"
        "    print(*{'torch', 'vllm', 'transformers'} & set(sys.modules), file=sys.stderr)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *argv], check=False, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["calibrators"],
        ["models"],
        ["--version"],
        ["eval", "--help"],
        ["bench", "--help"],
    ],
)
def test_light_commands_import_nothing_heavy(argv):
    done = run(*argv)
    assert done.returncode == 0
    assert done.stdout
    assert done.stderr.split() == []


def test_help_is_quick():
    # Seconds of the processor, and the best of a few: the machine may be busy with something else.
    seconds = []
    for _ in range(3):
        began = sum(os.times()[2:4])
        run("--help")
        seconds.append(sum(os.times()[2:4]) - began)
    assert 0 < min(seconds) < 1


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for command in ("serve", "models", "calibrators", "doctor", "eval", "profile", "bench"):
        assert re.search(rf"^    {command}\s+\w", out, re.MULTILINE)


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"trimtab {__version__}\n"


@pytest.mark.parametrize(
    "argv", [[], ["fly"], ["models", "prepare"], ["doctor", "--port", "1"], ["eval", "--data", "x"]]
)
def test_what_is_no_command(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    assert "usage: trimtab" in capsys.readouterr().err


def test_the_table_of_calibrators(capsys):
    assert cli.main(["calibrators"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("zerotuning  ZeroTuning, text\n")
    for name in ("gamma", "layers", "heads"):
        assert f"\n  {name} " in out


MILDER = """
from typing import ClassVar, Literal

from calibrators.zerotuning import ZeroTuning, ZeroTuningSettings


class MilderSettings(ZeroTuningSettings):
    method: Literal["milder"] = "milder"


class Milder(ZeroTuning):
    name: ClassVar[str] = "milder"
    title: ClassVar[str] = "Milder"
    Settings: ClassVar[type] = MilderSettings
"""


@pytest.fixture
def plugins_installed(tmp_path, monkeypatch):
    """A distribution that provides one calibrator that works and one that cannot be imported."""
    names = "[trimtab.calibrators]\nmilder = milder:Milder\nbroken = nowhere:Broken\n"
    for name, value in plugins.install(tmp_path, "milder", MILDER, names).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TRIMTAB_CALIBRATORS", raising=False)


def test_what_is_installed_is_named_and_not_imported(plugins_installed):
    done = run("calibrators")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in titles(done.stdout)] == list(BUILT_IN)
    last = "installed, but not on offer without --calibrators: broken, milder"
    assert done.stdout.splitlines()[-1] == last


@pytest.mark.parametrize("argv", [("--calibrators", "milder,zerotuning"), ()])
def test_the_table_has_what_is_on_offer(plugins_installed, monkeypatch, argv):
    if not argv:
        monkeypatch.setenv("TRIMTAB_CALIBRATORS", "milder,zerotuning")
    done = run("calibrators", *argv)
    assert done.returncode == 0, done.stderr
    assert titles(done.stdout) == ["milder  Milder, text", "zerotuning  ZeroTuning, text"]
    assert done.stdout.splitlines()[-1].endswith(": act, broken, gift, var, vhr")


def titles(table):
    """First lines of the paragraphs that describe a calibrator."""
    return [line for line in table.splitlines() if re.match(r"\w+  \w+, (text|vision)$", line)]


def test_an_empty_offer(capsys):
    assert cli.main(["calibrators", "--calibrators", ""]) == 0
    out = capsys.readouterr().out
    assert out.startswith("no calibrator is on offer\n")
    assert "without --calibrators: act, gift, var, vhr, zerotuning" in out


@pytest.mark.parametrize("name", ["broken", "nobody"])
def test_an_offer_that_cannot_be_made_is_one_line_and_status_2(plugins_installed, name):
    done = run("calibrators", "--calibrators", f"zerotuning,{name}")
    assert (done.returncode, done.stdout) == (2, "")
    message = done.stderr.splitlines()[0]
    assert message.startswith("trimtab: ")
    assert repr(name) in message
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("folder", [None, "/somewhere"])
def test_models_and_where_they_are(monkeypatch, capsys, folder):
    monkeypatch.setattr(models, "is_prepared", lambda name: folder)
    assert cli.main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(models.EMBEDDED)
    assert all(line.endswith(folder or "not prepared") for line in lines)


def test_the_last_line_of_a_prepared_model_is_its_folder(monkeypatch, capsys, tmp_path):
    def prepare(name, report):
        report(f"converting {name}")
        return tmp_path

    monkeypatch.setattr(models, "prepare", prepare)
    assert cli.main(["models", "prepare", "some"]) == 0
    assert capsys.readouterr().out.splitlines() == ["converting some", str(tmp_path)]


def test_an_unknown_model_is_one_line_and_status_2(capsys):
    assert cli.main(["models", "prepare", "no-such-model"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert "no-such-model" in captured.err


def test_the_doctor_gets_its_arguments(monkeypatch):
    calls = []
    monkeypatch.setattr(doctor, "main", lambda *args: calls.append(args) or 1)
    assert cli.main(["doctor", "--url", "http://host", "--api-key", "k"]) == 1
    assert cli.main(["doctor"]) == 1
    assert calls == [("http://host", "k"), (None, None)]
