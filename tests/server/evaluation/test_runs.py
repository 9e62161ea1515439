import asyncio

import pytest

from server.evaluation.api import Receipt
from server.evaluation.runs import Outcome, Run, RunFailed, run
from server.evaluation.scoring import Generate, Verdict

pytestmark = pytest.mark.anyio
GAMMA = {"method": "zerotuning", "gamma": 0.5}


@pytest.fixture
def samples(make_sample):
    return [make_sample(id=str(number), prompt=f"{number}?") for number in range(6)]


class Slow:
    """Counts how many samples are under way."""

    def __init__(self):
        self.asked = []
        self.running = self.most = 0

    async def ask(self, sample, calibration):
        self.asked.append(sample.id)
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0.001)
        self.running -= 1
        return Verdict(" yes", None, None, ())


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_samples_are_asked_so_many_at_a_time(samples, concurrency):
    scorer = Slow()
    result = await run(scorer, samples, None, concurrency)
    assert scorer.most == concurrency
    assert scorer.asked == ["0", *(sample.id for sample in samples)]
    assert [outcome.sample for outcome in result.outcomes] == samples
    assert all(0.001 <= outcome.seconds <= result.seconds for outcome in result.outcomes)


async def test_shares_of_a_run(connect, samples):
    def prefers(text, calibration):
        return {"0": "perhaps", "1": "no"}.get(text[0], "yes")

    _, api = await connect(prefers=prefers)
    result = await run(Generate(api), samples)
    assert (result.accuracy.count, result.accuracy.total) == (4, 6)
    assert (result.valid.count, result.valid.total) == (5, 6)
    assert (result.accuracy_among_valid.count, result.accuracy_among_valid.total) == (4, 5)
    assert (result.digests, result.skipped, result.calibration) == ((), 0, None)


async def test_receipts_of_a_run(connect, samples):
    _, api = await connect(flaw="skips")
    result = await run(Generate(api), samples, GAMMA)
    assert (result.digests, result.skipped) == (("0123456789ab",), 6)


async def test_without_a_valid_answer_there_is_no_accuracy_among_them(connect, samples):
    _, api = await connect(prefers="perhaps")
    result = await run(Generate(api), samples)
    assert (result.valid.count, result.accuracy_among_valid) == (0, None)


@pytest.mark.parametrize(
    ("flaw", "message"),
    [
        ("fails once", r"sample \d: status 500: not finite"),
        ("breaks", r"sample \d: the request failed: ReadError"),
        ("digest changes", "have the digests"),
    ],
)
async def test_one_sample_without_an_answer_fails_the_run(connect, samples, flaw, message):
    _, api = await connect(flaw=flaw)
    with pytest.raises(RunFailed, match=message) as caught:
        await run(Generate(api), samples, GAMMA)
    assert not caught.value.refused


async def test_a_refused_calibration_costs_one_request(connect, samples):
    fake, api = await connect()
    with pytest.raises(RunFailed, match=r"sample 0: status 400: calibration\.gamma") as caught:
        await run(Generate(api), samples, {"method": "zerotuning", "gamma": -1})
    assert caught.value.refused
    assert len(fake.requests) == 1


async def test_a_mistake_of_ours_is_not_taken_for_the_servers(samples):
    class Broken:
        calls = 0

        async def ask(self, sample, calibration):
            self.calls += 1
            if self.calls > 1:
                raise ZeroDivisionError
            return Verdict(" yes", None, None, ())

    with pytest.raises(ExceptionGroup) as caught:
        await run(Broken(), samples)
    assert caught.group_contains(ZeroDivisionError)


def test_latency_and_difference(make_sample):
    def made(choices, calibration=None):
        receipt = Receipt("0123456789ab", 1, ())
        verdicts = [Verdict(choice, choice, None, (receipt,)) for choice in choices]
        outcomes = [Outcome(make_sample(), v, float(i)) for i, v in enumerate(verdicts)]
        return Run(calibration, tuple(outcomes), 10.0)

    before, after = made([" no", " yes", " no"]), made([" yes", " yes", " yes"], GAMMA)
    found = after.against(before)
    assert (found.gained, found.lost) == (2, 0)
    assert (after.latency.mean, after.latency.p50, after.latency.p90) == (1.0, 1.0, 1.8)
