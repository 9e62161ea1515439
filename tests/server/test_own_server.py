import os
import signal
import subprocess
import sys

import httpx
import pytest

from server import own_server
from server.own_server import StartFailed, free_port, running, stop

READY = """
import os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(os.environ.get("VLLM_API_KEY", "no key").encode())
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""
STUBBORN = """
import signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("deaf", flush=True)
time.sleep(60)
"""


@pytest.fixture
def instead(monkeypatch):
    """Start a script in the place of the server."""
    started = []

    def use(script):
        popen = subprocess.Popen

        def start(command, **options):
            assert command[1:4] == ["-m", "server.cli", "serve"]
            started.append(popen([sys.executable, "-c", script, *command[4:]], **options))
            return started[-1]

        monkeypatch.setattr(own_server.subprocess, "Popen", start)
        return started

    yield use
    for process in started:
        assert process.poll() is not None


def test_the_server_runs_for_the_block(instead):
    started, lines = instead(READY), []
    with running(lines.append) as address:
        assert started[0].poll() is None
        assert os.getpgid(started[0].pid) == started[0].pid
        assert httpx.get(f"{address}/ready", trust_env=False).text == "no key"
    assert started[0].returncode == -signal.SIGTERM
    assert lines[0].startswith("starting a server")
    assert lines[1].startswith("ready after ")
    assert lines[-1] == "stopping the server"


def test_the_key_travels_in_the_environment(instead):
    started = instead(READY)
    with running(print, api_key="secret") as address:
        assert httpx.get(address, trust_env=False).text == "secret"
        assert "secret" not in started[0].args


def test_the_server_is_stopped_when_the_block_fails(instead):
    instead(READY)
    with pytest.raises(KeyboardInterrupt), running(print):
        raise KeyboardInterrupt


def test_a_start_that_fails_shows_the_end_of_the_output(instead):
    instead("import sys; print(*range(100), sep='\\n'); sys.exit('the reason')")
    with pytest.raises(StartFailed) as caught, running(print):
        pytest.fail("it never got ready")
    lines = str(caught.value).splitlines()
    assert lines[0] == "the server ended at start-up"
    assert "the reason" in lines
    assert "0" not in lines
    assert len(lines) == 1 + own_server.TAIL_LINES


def test_a_start_that_takes_too_long_is_given_up(instead, monkeypatch):
    monkeypatch.setattr(own_server, "START_SECONDS", 0.1)
    instead("import time; print('still loading', flush=True); time.sleep(60)")
    with pytest.raises(StartFailed, match=r"not ready in 0\.1 s"), running(print):
        pytest.fail("it never got ready")


def test_progress_is_visible(instead, monkeypatch):
    class Enough(Exception):
        pass

    def report(line):
        if line.startswith("still starting after "):
            lines.append(line)
            if len(lines) == 2:
                raise Enough

    monkeypatch.setattr(own_server, "PROGRESS_SECONDS", 0)
    monkeypatch.setattr(own_server, "POLL_SECONDS", 0.05)
    instead("import time; time.sleep(60)")
    lines = []
    with pytest.raises(Enough), running(report):
        pytest.fail("it never got ready")


def test_who_does_not_listen_is_killed(monkeypatch):
    monkeypatch.setattr(own_server, "STOP_SECONDS", 0.2)
    process = subprocess.Popen(
        [sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, start_new_session=True
    )
    with process.stdout as output:
        assert output.readline() == b"deaf\n"
        stop(process)
    assert process.returncode == -signal.SIGKILL


def test_a_free_port_can_be_listened_on():
    assert 1024 <= free_port() < 65536
