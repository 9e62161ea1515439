"""Thousands of requests, and the server holds what it held before.

`make soak` runs ten thousand and logs the figures; the ordinary suite runs a few hundred. Both are
judged by one bound, which takes exact figures: in rounds of sixty requests the worker's resident
memory grew by up to 60,000 bytes per request, what it had allocated by -701 to 532.
"""

from __future__ import annotations

import logging
import os
import time
from statistics import median

import pytest

from tests.integration.state.calls import growth, outcomes
from tests.integration.state.conftest import STEP
from tests.integration.state.soak import PARALLEL, Reading, Soak, slope

REQUESTS = int(os.environ.get("SOAK_REQUESTS", "600"))
ROUNDS = 10
WARM_UP = ROUNDS // 5
MIXED = REQUESTS // ROUNDS
PLAIN = MIXED // 4
# Bytes that a calibrated request may cost beyond a plain one.
ALLOWED = 1024
# Bytes that a round costs a process whatever its requests.
ROUND = {"front end": 200_000}
log = logging.getLogger(__name__)


@pytest.fixture(scope="module")
def soak(server):
    """What rounds of requests did, and readings between them once the server is warm."""
    soak, readings, began = Soak(server), [], time.monotonic()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    soak.warm_up(STEP)
    for number in range(ROUNDS):
        if number == WARM_UP:
            readings.append(Reading.of(server))
        for size, mixed in ((PLAIN, False), (MIXED, True)):
            soak.round(size, mixed=mixed)
            if number >= WARM_UP:
                readings.append(Reading.of(server))
    soak.close()
    seconds = time.monotonic() - began
    log.info("%d mixed and %d plain requests: %.0f s", REQUESTS, PLAIN * ROUNDS, seconds)
    log.info("calibrated: %d answered, %d abandoned", soak.answered, soak.abandoned)
    log.info("%d series, open files %s", len(readings[0].series), readings[-1].files)
    yield soak, readings


@pytest.mark.timeout(3600)
def test_every_request_is_counted_once(server, soak):
    before, (run, readings) = outcomes(server), soak
    settling = len(readings)
    ended = growth(run.outcomes, before)
    assert ended == {"applied": run.answered + settling, "failed": run.abandoned}


def test_an_idle_server_holds_and_answers_what_it_did(soak):
    first, *others = soak[1]
    for reading in others:
        assert reading.answers == first.answers
        assert reading.tables == first.tables
        assert reading.series == first.series
        for process, number in reading.files.items():
            assert number <= first.files[process] + PARALLEL


@pytest.mark.parametrize("process", ["front end", "engine", "worker"])
def test_memory_does_not_grow_with_calibrated_requests(soak, process):
    """Medians: what leaks grows in every round, and what is kept for once comes in one.

    In the short form a request may leave 3 KB in the front end before it shows.
    """
    readings = soak[1]
    grown = slope(readings, process, PLAIN, MIXED)
    held, resident = (
        getattr(readings[-1], name)[process] / (1 << 20) for name in ("allocated", "resident")
    )
    log.info("%s: %.1f of %.1f MiB, bytes per request: %s", process, held, resident, grown)
    allowed = max(ALLOWED, ROUND.get(process, 0) / MIXED)
    assert median(grown.mixed) <= max(0, median(grown.plain)) + allowed
