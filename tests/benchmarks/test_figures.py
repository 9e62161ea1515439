import pytest

from benchmarks.figures import Ratio, of_medians, paired, table


def test_paired_ratio_is_the_median_of_the_pairs_with_their_spread():
    ratio = paired([1.0, 8.0, 3.0], [2.0, 4.0, 3.0])

    assert ratio == Ratio(middle=1.0, low=0.5, high=2.0)


def test_drift_that_slows_both_of_a_pair_cancels():
    assert paired([1.0, 10.0], [2.0, 20.0]) == Ratio(0.5, 0.5, 0.5)


def test_pairs_have_to_be_complete():
    with pytest.raises(ValueError):
        paired([1.0, 2.0], [1.0])


def test_ratio_of_medians_takes_all_rounds_and_spreads_over_starts():
    ratio = of_medians([[1.0, 1.0], [3.0, 3.0]], [[2.0, 2.0], [2.0, 2.0]])

    assert ratio == Ratio(middle=1.0, low=0.5, high=1.5)


def test_ratio_of_medians_of_one_start_has_no_spread():
    assert of_medians([[1.0]], [[2.0]]) == Ratio(0.5, 0.5, 0.5)


def test_table_is_markdown_whose_columns_line_up():
    assert table(("a", "long"), [("xyz", "1")]).splitlines() == [
        "| a   | long |",
        "| --- | ---- |",
        "| xyz | 1    |",
    ]
