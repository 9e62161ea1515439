import pytest
from pytest import approx

from server.evaluation.statistics import mcnemar, paired_difference, proportion


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_intervals_are_the_published_ones(count, total, low, high):
    share = proportion(count, total)
    assert share.value == count / total
    assert (share.low, share.high) == (approx(low, abs=5e-5), approx(high, abs=5e-5))


@pytest.mark.parametrize(
    ("gained", "lost", "p_value"),
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (6, 0, 2 / 2**6),
        (0, 6, 2 / 2**6),
        # 2 * (C(10,0) + C(10,1) + C(10,2)) / 2^10
        (8, 2, 112 / 1024),
    ],
)
def test_mcnemar_counts_coin_tosses(gained, lost, p_value):
    assert mcnemar(gained, lost) == approx(p_value)


def test_a_paired_difference_counts_what_changed():
    before = [True] * 50 + [False] * 50
    after = [True] * 45 + [False] * 5 + [True] * 15 + [False] * 35
    found = paired_difference(before, after)
    assert (found.gained, found.lost) == (15, 5)
    assert found.difference == approx(0.1)
    assert found.p_value == approx(mcnemar(15, 5))
    # Normal approximation: 0.1 +- 1.96 * sqrt((20 - 100 * 0.01) / 100^2)
    half = 1.96 * (20 - 1) ** 0.5 / 100
    assert (found.low, found.high) == (approx(0.1 - half, abs=0.015), approx(0.1 + half, abs=0.015))
    assert paired_difference(before, after) == found
    assert paired_difference(after, before).difference == -found.difference


def test_equal_answers_have_no_difference():
    found = paired_difference([True, False], [True, False])
    assert (found.difference, found.low, found.high, found.p_value) == (0, 0, 0, 1)


def test_samples_must_be_the_same():
    with pytest.raises(ValueError, match="longer"):
        paired_difference([True], [True, False])
