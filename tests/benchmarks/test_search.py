import pytest

from benchmarks import search
from benchmarks.search import Comparison, Speed


def comparison():
    return Comparison(Speed(1800, 90.0), (Speed(30, 9.0), Speed(30, 6.0)))


def test_the_ratio_is_that_of_seconds_per_pair():
    assert comparison().one_by_one == Speed(60, 15.0)
    assert comparison().ratio == pytest.approx(5.0)


def test_what_was_measured_on_a_part_is_scaled_and_called_so():
    lines = search.report(comparison()).splitlines()

    assert "450.0 (scaled)" in lines[3]
    assert "before, after: 300, 200 ms" in lines[3]
    assert lines[-1] == "ratio 5.00"


def test_every_head_is_probed_once():
    probes = search._probes(9)

    assert [probe.calibration["heads"] for probe in probes] == [[head] for head in range(9)]


def test_the_search_that_is_documented_is_the_default():
    args = search._parser().parse_args([])

    assert (args.samples, args.scoring) == (200, "generate")
    assert len(search.read(search.DATA).samples) >= args.samples
