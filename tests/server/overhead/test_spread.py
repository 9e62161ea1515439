import pytest

from server.overhead.spread import Spread, paired, spread


def test_a_spread_is_the_median_with_the_smallest_and_the_largest():
    assert spread([3.0, 1.0, 8.0]) == Spread(middle=3.0, low=1.0, high=8.0)


def test_paired_ratio_is_the_median_of_the_pairs_with_their_spread():
    ratio = paired([1.0, 8.0, 3.0], [2.0, 4.0, 3.0])

    assert ratio == Spread(middle=1.0, low=0.5, high=2.0)


def test_drift_that_slows_both_of_a_pair_cancels():
    assert paired([1.0, 10.0], [2.0, 20.0]) == Spread(0.5, 0.5, 0.5)


def test_pairs_have_to_be_complete():
    with pytest.raises(ValueError):
        paired([1.0, 2.0], [1.0])


def test_digits_are_chosen_where_it_is_shown():
    assert str(Spread(1.0, 0.25, 2.0)) == "1.000 (0.250..2.000)"
    assert Spread(103.26, 99.0, 120.0).shown(1) == "103.3 (99.0..120.0)"
