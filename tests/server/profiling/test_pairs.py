import asyncio
from contextlib import contextmanager

import pytest

from server.evaluation.api import ApiFailure
from server.evaluation.samples import Sample
from server.profiling.pairs import MeasurementFailed, Pairs, mean
from server.profiling.search import BASELINE, Candidate, Stage
from server.profiling.state import opened

SAMPLES = [Sample(name, name, (), ("yes", "no"), "yes") for name in "abcd"]
STAGE = Stage(
    "probe", "answers", (BASELINE, *(Candidate(f"head {h}", {"heads": [h]}) for h in range(3)))
)


class SlowQuestion:
    """Notes which pairs were under way together; later samples answer first."""

    def __init__(self, fail_on=None):
        self.asked, self.together = [], []
        self._under_way, self._fail_on = set(), fail_on

    async def ask(self, sample, calibration):
        pair = (sample.id, str(calibration))
        self._under_way.add(pair)
        self.asked.append(pair)
        await asyncio.sleep(0.001 * (4 - "abcd".index(sample.id)))
        self.together.append(set(self._under_way))
        self._under_way.remove(pair)
        if sample.id == self._fail_on:
            raise ApiFailure("status 500")
        return {"accuracy": float("abcd".index(sample.id))}


@contextmanager
def no_bar(name, total, done):
    yield lambda: None


@pytest.fixture
def measure(tmp_path):
    """Measures the stage with a question, on the state that earlier measuring left."""

    def measured(question, concurrency):
        with opened(tmp_path / "state", {}) as state:
            pairs = Pairs({"answers": question}, state, concurrency, no_bar)
            return asyncio.run(pairs.measure(STAGE, SAMPLES))

    return measured


def test_values_come_by_candidate_and_sample_whichever_came_first(measure):
    assert measure(SlowQuestion(), 5) == [[{"accuracy": float(i)} for i in range(4)]] * 4


@pytest.mark.parametrize("concurrency", [1, 6, 100])
def test_no_more_pairs_are_under_way_than_allowed(measure, concurrency):
    question = SlowQuestion()
    measure(question, concurrency)

    assert max(map(len, question.together)) == min(concurrency, 16)


def test_different_candidates_are_under_way_together(measure):
    question = SlowQuestion()
    measure(question, 8)

    assert max(len({calibration for _, calibration in pairs}) for pairs in question.together) > 1


def test_a_failure_names_the_pair_and_keeps_what_there_was(measure):
    with pytest.raises(MeasurementFailed, match="probe, baseline, sample c: status 500"):
        measure(SlowQuestion(fail_on="c"), 1)
    again = SlowQuestion()
    measure(again, 1)

    assert ("a", "None") not in again.asked
    assert again.asked[0] == ("c", "None")
    assert len(again.asked) == 14


def test_what_is_known_is_not_asked_again(measure):
    measure(SlowQuestion(), 4)
    again = SlowQuestion()
    measure(again, 4)

    assert again.asked == []


def test_means_are_taken_by_name():
    assert mean([{"x": 1.0, "y": 0.0}, {"x": 2.0, "y": 1.0}]) == {"x": 1.5, "y": 0.5}
