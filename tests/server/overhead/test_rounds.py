import asyncio

import pytest

from server.evaluation.api import ApiFailure
from server.overhead import rounds
from server.overhead.prompts import Tokens
from server.overhead.rounds import Load, compare, play
from server.overhead.spread import paired
from tests.server.overhead.fake import method

pytestmark = pytest.mark.anyio
PROMPTS = Tokens([1, 2, 3], 7, seed=0)
LOAD = Load(requests=2, concurrency=1, tokens=3, rounds=3)
CALIBRATIONS = ("act", {"method": "zerotuning", "gamma": 0.5})


async def compared(connect, load=LOAD, calibrations=CALIBRATIONS, said=None, **options):
    fake, api = await connect(**options)
    told = [] if said is None else said
    return fake, await compare(api, PROMPTS, calibrations, load, told.append)


async def test_a_round_has_the_figures_of_its_requests(connect):
    _, api = await connect({"act": 3.0})
    found = await play(api, PROMPTS, "act", LOAD)

    assert found.seconds == pytest.approx(2 * 3 * 1.2)
    assert found.ttft == pytest.approx(3.0)
    assert found.tpot == pytest.approx(0.3)
    assert found.throughput == pytest.approx(6 / 7.2)


async def test_without_further_tokens_a_round_has_no_time_for_them(connect):
    _, api = await connect()

    assert (await play(api, PROMPTS, None, Load(2, 2, tokens=1, rounds=1))).tpot is None


async def test_every_kind_has_its_rounds_and_the_warm_up_is_not_among_them(connect):
    fake, rows = await compared(connect)

    assert [row.name for row in rows] == ["plain", "act", '{"method": "zerotuning", "gamma": 0.5}']
    assert [len(row.rounds) for row in rows] == [3, 3, 3]
    assert [row.digest for row in rows] == [None, "0123456789ab", "0123456789ab"]
    assert len(fake.requests) == 4 * 3 * LOAD.requests


async def test_every_other_round_runs_backwards(connect):
    fake, _ = await compared(connect, Load(1, 1, 1, rounds=3))
    asked = [method(body["calibration"]) for _, body in fake.requests]
    forth = ["none", "act", "zerotuning"]

    assert asked == [*forth[::-1], *forth, *forth[::-1], *forth]


async def test_drift_of_the_machine_cancels(connect):
    # Every request is 1 % slower than the one before.
    _, rows = await compared(connect, Load(1, 1, 4, rounds=8), drift=1.01)

    for row in rows[1:]:
        ratio = paired([r.ttft for r in row.rounds], [r.ttft for r in rows[0].rounds])
        assert ratio.high > 1.005 and ratio.low < 0.995
        assert ratio.middle == pytest.approx(1, abs=0.001)


async def test_prompts_are_all_new(connect):
    prompts = Tokens(list(range(1000)), 16, seed=0)
    fake, api = await connect()
    await compare(api, prompts, ["act"], LOAD, lambda line: None)
    sent = [tuple(body["prompt"]) for _, body in fake.requests]

    assert len(set(sent)) == len(sent)


@pytest.mark.parametrize("flaw", ["refused", "no receipt", "skips", "digests", "breaks"])
async def test_what_fails_has_no_figures_and_costs_itself_alone(connect, flaw):
    said = []
    _, (plain, act, zerotuning) = await compared(connect, said=said, flaws={"act": flaw})

    assert act.error and f"act: {act.error}" in said
    assert act.refused is (flaw == "refused")
    assert (act.rounds, act.digest) == ([], None)
    assert len(plain.rounds) == len(zerotuning.rounds) == 3
    assert plain.error is zerotuning.error is None


async def test_a_calibration_that_failed_is_not_asked_again(connect):
    fake, _ = await compared(connect, flaws={"act": "refused"})

    assert sum(method(body["calibration"]) == "act" for _, body in fake.requests) <= LOAD.requests


async def test_without_plain_rounds_there_is_nothing_to_compare_with(connect):
    with pytest.raises(ApiFailure, match="the request failed"):
        await compared(connect, flaws={"none": "breaks"})


@pytest.mark.parametrize("concurrency", [1, 3, 5])
async def test_no_more_requests_are_under_way_than_allowed(connect, monkeypatch, concurrency):
    under_way, seen = 0, []
    timed = rounds.timed

    async def counted(*args):
        nonlocal under_way
        under_way += 1
        seen.append(under_way)
        await asyncio.sleep(0)
        result = await timed(*args)
        under_way -= 1
        return result

    monkeypatch.setattr(rounds, "timed", counted)
    _, api = await connect()
    await play(api, PROMPTS, None, Load(5, concurrency, 2, 1))
    assert (max(seen), len(seen)) == (concurrency, 5)
