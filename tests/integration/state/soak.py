"""Many short requests, and what the server's processes hold after each round of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean, median
from typing import Any

import httpx
import psutil

from tests.integration.serving import Server
from tests.integration.state.calls import outcomes, settled

PARALLEL = 16
# A request that its client leaves would take a minute to its last token.
ENDLESS = 2000
# As long as a busy machine may need to take up a request: one that is left before is not counted.
UNTIL_TAKEN_UP = httpx.Timeout(300, read=1)
SETTINGS: list[dict[str, Any]] = [
    {"gamma": 0.2},
    {"gamma": 0.5},
    {"gamma": 3},
    {"gamma": 0.1, "layers": [0, 1]},
    {"gamma": 10, "layers": [14]},
    {"gamma": 0.7, "heads": [2, 5]},
    {"gamma": 4, "heads": {"3": [0], "20": [1, 2]}},
    {"gamma": 1},
    {"gamma": 2, "layers": [28, 29], "heads": [8]},
    {"gamma": 0.9, "layers": [7]},
    {"gamma": 50, "layers": [3, 4, 5], "heads": [0]},
    {"gamma": 1.5, "heads": [0, 1, 2, 3, 4, 5, 6, 7, 8]},
]


@dataclass
class Soak:
    """A run against one server.

    Attributes:
        answered: calibrated requests that were answered.
        abandoned: calibrated requests whose clients hung up.
        outcomes: the server's count before the first of them.
    """

    server: Server
    seed: int = 0
    answered: int = 0
    abandoned: int = 0
    outcomes: dict[str, float] = field(init=False)
    _client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self.outcomes = outcomes(self.server)
        limits = httpx.Limits(max_connections=PARALLEL, max_keepalive_connections=PARALLEL)
        self._client = httpx.Client(base_url=self.server.url, timeout=300, limits=limits)

    def warm_up(self, step: int) -> None:
        """Have steps of every number of tokens, up to `step`, and of every number of requests.

        vLLM's matrix products keep a megabyte for each number of rows they have met. Rounds of a
        few dozen requests meet new ones for long.
        """
        for length in range(1, step + 1):
            self._answer({"prompt": [1000 + length] * length, "max_tokens": 1}, False)
        for number in range(1, PARALLEL + 1):
            prompts = [[2000 + index] for index in range(number)]
            self._answer({"prompt": prompts, "max_tokens": 3, "ignore_eos": True}, False)

    def round(self, requests: int, *, mixed: bool) -> None:
        """Send requests: plain, or one in five plain and one in twenty hung up."""
        calls = [self._call(index, mixed) for index in range(requests)]
        with ThreadPoolExecutor(PARALLEL) as pool:
            for _ in pool.map(lambda call: call(), calls):
                pass

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def _call(self, index: int, mixed: bool) -> Callable[[], None]:
        draw = self._random
        tokens = [draw.randrange(1000, 49000) for _ in range(draw.randint(1, 4))]
        body: dict[str, Any] = {"prompt": tokens, "max_tokens": 1, "ignore_eos": True}
        calibrated = mixed and index % 5 != 0
        if calibrated:
            body["calibration"] = {"method": "zerotuning", **draw.choice(SETTINGS)}
        if not (mixed and index % 20 in (5, 13)) or index % 40 >= 20:
            self.answered += calibrated
            return lambda: self._answer(body, calibrated)
        self.abandoned += calibrated
        body["max_tokens"] = ENDLESS
        return lambda: self._leave(body, stream=index % 20 == 13)

    def _answer(self, body: dict[str, Any], calibrated: bool) -> None:
        response = self._client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        assert ("calibration" in response.json()) == calibrated

    def _leave(self, body: dict[str, Any], *, stream: bool) -> None:
        if not stream:
            with suppress(httpx.ReadTimeout):
                self._client.post("/v1/completions", json=body, timeout=UNTIL_TAKEN_UP)
                raise AssertionError("there was no time for an answer")
            return
        with self._client.stream("POST", "/v1/completions", json={**body, "stream": True}) as left:
            next(left.iter_lines())


@dataclass(frozen=True)
class Reading:
    """What an idle server holds.

    Attributes:
        answers: to requests that are always the same.
        tables: lengths of what Trimtab's objects hold, by process and path.
        series: label sets of all `trimtab_*` metrics.
        allocated: bytes that are not freed, by process.
        resident: bytes by process.
        files: open by process.
    """

    answers: list[Any]
    tables: dict[str, dict[str, int]]
    series: frozenset[str]
    allocated: dict[str, int]
    resident: dict[str, int]
    files: dict[str, int]

    @classmethod
    def of(cls, server: Server) -> Reading:
        """Once it is idle."""
        answers, tables = settled(server)
        with server.client() as client:
            shown = client.get("/sizes").json()
            lines = client.get("/metrics").text.splitlines()
        series = (line.rsplit(" ", 1)[0] for line in lines if line.startswith("trimtab_"))
        processes = {name: psutil.Process(shown[name]["pid"]) for name in shown}
        return cls(
            answers,
            tables,
            frozenset(series),
            {name: shown[name]["allocated"] for name in shown},
            {name: process.memory_info().rss for name, process in processes.items()},
            {name: process.num_fds() for name, process in processes.items()},
        )


@dataclass(frozen=True)
class Slope:
    """Growth of what one process has allocated, in bytes per request, round by round."""

    plain: list[float]
    mixed: list[float]

    def __str__(self) -> str:
        return f"plain {_shown(self.plain)}, mixed {_shown(self.mixed)}"


def slope(readings: Sequence[Reading], process: str, plain: int, mixed: int) -> Slope:
    """Of `readings` taken before and after rounds, plain and mixed in turn, of so many requests."""
    grown = [b.allocated[process] - a.allocated[process] for a, b in pairwise(readings)]
    return Slope([each / plain for each in grown[::2]], [each / mixed for each in grown[1::2]])


def _shown(values: Sequence[float]) -> str:
    return f"{median(values):.0f} (mean {fmean(values):.0f}, {min(values):.0f}..{max(values):.0f})"
