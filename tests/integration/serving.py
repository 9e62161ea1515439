"""Real servers for tests: `trimtab serve` as a subprocess on a free loopback port."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

START_SECONDS = 580
STOP_SECONDS = 60


@dataclass
class Server:
    """A running server."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def client(self) -> httpx.Client:
        """A client that waits as long as a slow machine needs.

        It has no use for certificates, and reading them would take 20 ms of every call.
        """
        return httpx.Client(base_url=self.url, timeout=300, verify=False, trust_env=False)

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples of `name` that carry `labels`."""
        with self.client() as client:
            lines = client.get("/metrics").text.splitlines()
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in lines
            if line.split("{")[0].split(" ")[0] == name and all(w in line for w in wanted)
        )


def command(*flags: str) -> list[str]:
    """`trimtab serve` with `flags`."""
    return [sys.executable, "-m", "server.cli", "serve", *flags]


def one_core_each(ranks: int) -> dict[str, str]:
    """Environment that binds each rank to a core of its own, which vLLM leaves to the caller."""
    cores = sorted(os.sched_getaffinity(0))
    binding = "|".join(str(cores[rank % len(cores)]) for rank in range(ranks))
    return {"VLLM_CPU_OMP_THREADS_BIND": binding}


def free_port() -> int:
    """A loopback port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def serving(
    log: Path,
    *flags: str,
    env: dict[str, str] | None = None,
    program: Callable[..., list[str]] = command,
) -> Iterator[Server]:
    """Run a server until the block ends; a model comes before other flags."""
    port = free_port()
    with log.open("wb") as output:
        process = subprocess.Popen(
            program(*flags, "--host", "127.0.0.1", "--port", str(port)),
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        _wait_until_ready(server)
        yield server
    finally:
        _stop(process)


def _wait_until_ready(server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        try:
            if httpx.get(f"{server.url}/ready", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    tail = server.log.read_text(errors="replace")[-4000:]
    raise RuntimeError(f"the server did not start; its log ends:\n{tail}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
