import pytest
from scipy import stats

from server.profiling.entropies import Entropies, Mean


def entropies(before, after):
    return Entropies.of([{"entropy": x} for x in before], [{"entropy": x} for x in after])


def test_differences_are_those_of_each_sample():
    found = entropies([1.0, 2.0, 4.0], [0.5, 1.0, 3.5])
    expected = stats.ttest_rel([0.5, 1.0, 3.5], [1.0, 2.0, 4.0]).confidence_interval(0.95)

    assert (found.baseline.value, found.result.value) == pytest.approx((7 / 3, 5 / 3))
    assert (found.difference.low, found.difference.high) == pytest.approx(tuple(expected))


def test_one_sample_has_no_interval():
    assert Mean.of([2.0]) == Mean(2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("after", "told"),
    [
        ([0.5, 1.4, 2.5], "surer with the profile, significantly"),
        ([0.9, 2.1, 2.9], "did not help"),
        ([1.5, 2.4, 3.5], "did not help"),
    ],
)
def test_the_verdict_is_plain(after, told):
    found = entropies([1.0, 2.0, 3.0], after)

    assert told in found.verdict
    assert found.estimates[1].value == found.result.value
