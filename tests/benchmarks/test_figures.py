from benchmarks.figures import of_medians, table
from server.overhead.spread import Spread


def test_ratio_of_medians_takes_all_rounds_and_spreads_over_starts():
    ratio = of_medians([[1.0, 1.0], [3.0, 3.0]], [[2.0, 2.0], [2.0, 2.0]])

    assert ratio == Spread(middle=1.0, low=0.5, high=1.5)


def test_ratio_of_medians_of_one_start_has_no_spread():
    assert of_medians([[1.0]], [[2.0]]) == Spread(0.5, 0.5, 0.5)


def test_table_is_markdown_whose_columns_line_up():
    assert table(("a", "long"), [("xyz", "1")]).splitlines() == [
        "| a   | long |",
        "| --- | ---- |",
        "| xyz | 1    |",
    ]
