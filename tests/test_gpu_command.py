"""`make gpu` runs every test of a GPU, on machines without vLLM, too."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
MARKED = re.compile(r"pytest\.mark\.gpu\b")

# Names of tests, without one that imports vLLM; None in its place fails every import of it.
COLLECT = """
import sys
sys.modules["vllm"] = None
import pytest
code = pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *sys.argv[1:]])
inside = [name for name in sys.modules if name.startswith("server.engine")]
print("engine modules:", *inside)
sys.exit(code)
"""


def paths():
    found = re.search(r"^GPU_TESTS := ((?:.*\\\n)*.*)$", MAKEFILE, re.MULTILINE)
    return found[1].replace("\\\n", " ").split()


def collect(*arguments):
    finished = subprocess.run(
        [sys.executable, "-c", COLLECT, *arguments], capture_output=True, text=True, cwd=ROOT
    )
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-2000:]
    return finished.stdout


def test_every_marked_test_is_run():
    reached = [ROOT / path for path in paths()]
    marked = [
        file
        for file in (ROOT / "tests").rglob("*.py")
        if MARKED.search(file.read_text(encoding="utf-8")) and file != Path(__file__)
    ]
    assert marked
    missed = [file for file in marked if not any(path in (file, *file.parents) for path in reached)]
    assert missed == []


def test_without_vllm_everything_is_collected():
    found = collect(*paths())
    assert "test_shapes.py" in found and "test_on_gpu.py" in found


def test_kernels_are_tested_without_the_engine():
    found = collect("tests/server/kernels")
    assert "test_shapes.py" in found
    assert found.splitlines()[-1] == "engine modules:"


def test_without_a_gpu_nothing_passes_for_tested(tmp_path):
    nothing = tmp_path / "python"
    nothing.write_text("#!/bin/sh\nexit 1\n")
    nothing.chmod(0o755)
    finished = subprocess.run(
        ["make", "gpu", f"PYTHON={nothing}"], capture_output=True, text=True, cwd=ROOT
    )
    assert finished.returncode != 0
    assert "no torch that sees a GPU" in finished.stdout
