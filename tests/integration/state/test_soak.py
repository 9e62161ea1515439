"""Minutes of everything at once, with clients that crash; then the server is as before.

The short form belongs to `make test-all`; `make reliability` runs ten minutes.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.integration.serving import Server
from tests.integration.state.calls import SETTING, Caller, body, prompt
from tests.integration.state.conftest import STEP
from tests.integration.state.soak import Reading

SECONDS = float(os.environ.get("SOAK_SECONDS", "60"))
PARALLEL = 12
# A client that is killed with a stream half read.
CRASHING = """
import sys, httpx
with httpx.stream("POST", sys.argv[1] + "/v1/completions", content=sys.argv[2], timeout=None,
                  headers={"Content-Type": "application/json"}) as response:
    chunks = response.iter_raw()
    next(chunks)
    print("reading", flush=True)
    for _ in chunks:
        pass
"""
log = logging.getLogger(__name__)
pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]


class Clients:
    """Clients of all kinds, until time is up; what each kind met."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.met: Counter[str] = Counter()

    def run(self, seed: int, until: float) -> None:
        """One after the other."""
        draw = random.Random(seed)
        kinds = [self.plain, self.calibrated, self.streamed, self.chat, self.refused, self.odd]
        kinds = [*kinds * 4, self.leaving, self.leaving, self.crashing]
        while time.monotonic() < until:
            kind = draw.choice(kinds)
            kind(draw)
            self.met[kind.__name__] += 1

    def post(self, path: str, content: dict[str, Any], status: int = 200) -> httpx.Response:
        with self.server.client() as client:
            response = client.post(path, json=content)
        assert response.status_code == status, response.text
        return response

    def plain(self, draw: random.Random) -> None:
        self.post("/v1/completions", body(self.tokens(draw)))

    def calibrated(self, draw: random.Random) -> None:
        # ACT takes prompts that fit into a step.
        method, most = draw.choice([(SETTING, 200), ({"method": "act", "layers": "all"}, STEP)])
        content = body(self.tokens(draw, most), method)
        assert "calibration" in self.post("/v1/completions", content).json()

    def streamed(self, draw: random.Random) -> None:
        answer = self.post("/v1/completions", body(self.tokens(draw), SETTING, stream=True))
        assert answer.text.rstrip().endswith("data: [DONE]")

    def chat(self, draw: random.Random) -> None:
        content = "word " * draw.randint(1, 40)
        message = {"messages": [{"role": "user", "content": content}], "max_tokens": 8}
        self.post("/v1/chat/completions", message | {"n": draw.randint(1, 3)})

    def refused(self, draw: random.Random) -> None:
        wrong = draw.choice(["nothing", {"method": "zerotuning", "gamma": -1}, [], 5])
        self.post("/v1/completions", body([1, 2], wrong), 400)

    def odd(self, draw: random.Random) -> None:
        self.post(f"/{draw.randrange(10**9)}", {}, 404)

    def leaving(self, draw: random.Random) -> None:
        caller = Caller(self.server, body(self.tokens(draw), SETTING, max_tokens=1500))
        time.sleep(draw.uniform(0, 1))
        draw.choice([caller.hang_up, caller.break_off])()

    def crashing(self, draw: random.Random) -> None:
        content = json.dumps(body(self.tokens(draw), SETTING, max_tokens=1500, stream=True))
        command = [sys.executable, "-c", CRASHING, self.server.url, content]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"reading\n"
            process.send_signal(signal.SIGKILL)

    @staticmethod
    def tokens(draw: random.Random, most: int = 200) -> list[int]:
        return prompt(draw.randrange(10**6), draw.randint(1, most))


def run(server: Server, seconds: float, seed: int) -> Counter[str]:
    """All clients for some time; fails with the first of them."""
    clients, until = Clients(server), time.monotonic() + seconds
    with ThreadPoolExecutor(PARALLEL) as pool:
        list(pool.map(lambda number: clients.run(number, until), range(seed, seed + PARALLEL)))
    return clients.met


def test_minutes_of_everything_with_crashing_clients(server):
    run(server, SECONDS / 5, 1000)
    before = Reading.of(server)
    met = run(server, SECONDS, 0)
    after = Reading.of(server)
    log.info("%.0f s, %d requests: %s", SECONDS, met.total(), dict(met))
    for name in after.resident:
        grown = (after.resident[name] - before.resident[name]) / (1 << 20)
        held = (after.allocated[name] - before.allocated[name]) / met.total()
        log.info("%s: resident %+.1f MiB, held %+.0f bytes per request", name, grown, held)
        assert after.files[name] <= before.files[name] + PARALLEL
    assert after.answers == before.answers
    assert after.tables == before.tables
    assert "Traceback" not in server.log.read_text(errors="replace")
