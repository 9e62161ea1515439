"""A server of a command's own: started, awaited, stopped."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http import HTTPStatus
from typing import IO

import httpx

HOST = "127.0.0.1"
START_SECONDS = 300
# Longer than the 45 seconds the server gives requests that are still running.
STOP_SECONDS = 60
PROGRESS_SECONDS = 15
POLL_SECONDS = 0.5
TAIL_LINES = 20


class StartFailed(Exception):
    """The server did not become ready; shows the end of its output."""


@contextmanager
def running(
    report: Callable[[str], None],
    *,
    api_key: str | None = None,
    model: str | None = None,
    flags: Sequence[str] = (),
) -> Iterator[str]:
    """Serve a model for the duration of the block; gives the address.

    Args:
        report: takes lines on the progress.
        api_key: key the server shall ask for, None for no key.
        model: folder or name of the model, None for the embedded one.
        flags: further ones of `trimtab serve`.

    Raises:
        StartFailed: it ended, or was not ready in time.
    """
    with tempfile.TemporaryFile("w+b") as output:
        port = free_port()
        given = [] if model is None else [model]
        process = _start([*given, *flags, "--host", HOST, "--port", str(port)], api_key, output)
        address = f"http://{HOST}:{port}"
        try:
            report(f"starting a server with {model or 'the embedded model'} at {address}")
            _await_ready(process, address, output, report)
            yield address
        finally:
            report("stopping the server")
            stop(process)


def free_port() -> int:
    """A port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _start(
    arguments: Sequence[str], api_key: str | None, output: IO[bytes]
) -> subprocess.Popen[bytes]:
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_API_KEY"}
    if api_key:
        # Not as a flag: flags show in the list of processes.
        environment["VLLM_API_KEY"] = api_key
    return subprocess.Popen(
        [sys.executable, "-m", "server.cli", "serve", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )


def _await_ready(
    process: subprocess.Popen[bytes],
    address: str,
    output: IO[bytes],
    report: Callable[[str], None],
) -> None:
    started = said = time.monotonic()
    while not _is_ready(address):
        now = time.monotonic()
        if process.poll() is not None:
            raise StartFailed(f"the server ended at start-up\n{tail(output)}")
        if now - started > START_SECONDS:
            raise StartFailed(f"the server was not ready in {START_SECONDS} s\n{tail(output)}")
        if now - said >= PROGRESS_SECONDS:
            said = now
            report(f"still starting after {now - started:.0f} s")
        time.sleep(POLL_SECONDS)
    report(f"ready after {time.monotonic() - started:.0f} s")


def _is_ready(address: str) -> bool:
    with suppress(httpx.TransportError):
        response = httpx.get(f"{address}/ready", timeout=5, trust_env=False)
        return response.status_code == HTTPStatus.OK
    return False


def tail(output: IO[bytes]) -> str:
    """The last lines of what a process wrote."""
    output.seek(0)
    lines = output.read().decode(errors="replace").splitlines()
    return "\n".join(lines[-TAIL_LINES:])


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a group: politely first, then the whole group."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
