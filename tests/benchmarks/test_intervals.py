import pytest

from benchmarks.intervals import Figure, difference, figure, wilson
from benchmarks.objects import Share


def test_wilson_of_a_half():
    # Brown, Cai and DasGupta (2001), eq. 4, by hand for 5 of 10.
    found = wilson(5, 10)

    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.2366, 0.7634), abs=1e-4)


@pytest.mark.parametrize(("hits", "low", "high"), [(0, 0.0, 0.2775), (10, 0.7225, 1.0)])
def test_wilson_of_none_and_all_is_not_a_point(hits, low, high):
    found = wilson(hits, 10)

    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)


def test_wilson_of_nothing_knows_nothing():
    assert wilson(0, 0) == Figure(0.0, 0.0, 1.0)


def test_one_trial_per_scene_gets_wilsons_interval():
    assert figure(Share((1, 0, 1, 0), (1, 1, 1, 1))) == wilson(2, 4)


def test_bootstrap_covers_the_value_and_is_the_same_for_the_same_seed():
    share = Share((1, 2, 0, 3) * 25, (4, 4, 4, 4) * 25)
    found = figure(share, seed=1)

    assert found == figure(share, seed=1)
    assert found.low < found.value == 0.375 < found.high
    # The standard error of the mean of 100 scenes, values 0, .25, .5 and .75, is .028.
    assert found.high - found.low == pytest.approx(4 * 0.028, rel=0.15)


def test_questions_about_one_scene_are_not_independent():
    together = Share((10.0, 0.0) * 10, (10.0, 10.0) * 10)
    apart = Share((1.0, 1.0) * 10, (2.0, 2.0) * 10)

    assert figure(together).high - figure(together).low > 0.3
    assert figure(apart).high == figure(apart).low == 0.5


def test_difference_is_paired():
    better = Share((2, 3, 1, 4), (5, 5, 5, 5))
    worse = Share((1, 2, 0, 3), (5, 5, 5, 5))
    found = difference(better, worse)

    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.2, 0.2))


def test_nothing_counted_is_a_figure_of_nothing():
    assert figure(Share((0.0, 0.0), (0.0, 0.0))) == Figure(0.0, 0.0, 0.0)


def test_figures_are_written_in_per_cent():
    assert str(Figure(0.5, 0.25, 0.753)) == "50.0% (25.0%..75.3%)"
