import pytest

from server.evaluation.comparison import Row, compare, named, verdict
from server.evaluation.scoring import Generate
from server.evaluation.statistics import PairedDifference

GAMMA = {"method": "zerotuning", "gamma": 0.5}
NONE_BETTER = "No calibration is significantly better than the baseline at 5 %."


@pytest.fixture
def samples(make_sample):
    return [make_sample(id=str(number), prompt=f"{number}?") for number in range(8)]


def changed(calibration, difference, p_value):
    return Row(calibration, difference=PairedDifference(0, 0, difference, 0, 0, p_value))


@pytest.mark.anyio
async def test_rows_are_compared_with_the_baseline(connect, samples):
    def prefers(text, calibration):
        return "yes" if calibration == "act" or text < "3" else "no"

    _, api = await connect(prefers=prefers)
    told = []
    rows = await compare(Generate(api), samples, ["act", GAMMA], 2, 0, told.append)
    assert [row.name for row in rows] == ["baseline", "act", named(GAMMA)]
    assert [row.run.accuracy.count for row in rows] == [3, 8, 3]
    assert rows[0].difference is None
    assert (rows[1].difference.gained, rows[1].difference.p_value) == (5, 2 / 2**5)
    assert told == [f"{row.name}: 8 samples" for row in rows]


@pytest.mark.anyio
async def test_a_run_that_fails_costs_its_row_alone(connect, samples):
    _, api = await connect()
    refused = {"method": "zerotuning", "gamma": 0}
    rows = await compare(Generate(api), samples, [refused, "act"], 2, 0, lambda _: None)
    assert [row.error is None for row in rows] == [True, False, True]
    assert "gamma must be above 0" in rows[1].error
    assert rows[2].difference.difference == 0


@pytest.mark.anyio
async def test_without_a_baseline_nothing_is_compared(connect, samples):
    _, api = await connect(flaw="never plain")
    rows = await compare(Generate(api), samples, ["act"], 2, 0, lambda _: None)
    assert (rows[0].run, rows[1].difference) == (None, None)
    assert rows[1].run is not None
    assert verdict(rows) == ["Nothing was compared with the baseline."]


def test_nothing_better_is_said_plainly():
    assert verdict([Row(None), changed("act", 0.1, 0.06)]) == [NONE_BETTER]


def test_better_and_worse_are_named():
    rows = [Row(None), changed("act", 0.1, 0.01), changed(GAMMA, -0.1, 0.01)]
    assert verdict(rows) == [
        "act is significantly better than the baseline.",
        f"{named(GAMMA)} is significantly worse than the baseline.",
    ]
    assert verdict([Row(None), rows[2]]) == [
        NONE_BETTER,
        f"{named(GAMMA)} is significantly worse than the baseline.",
    ]


def test_more_comparisons_ask_for_smaller_p_values():
    better = changed("act", 0.1, 0.03)
    assert verdict([Row(None), better]) != [NONE_BETTER]
    assert verdict([Row(None), better, changed(GAMMA, 0, 1)]) == [NONE_BETTER]
    assert verdict([Row(None), better, Row(GAMMA, error="refused")]) != [NONE_BETTER]


def test_names_of_rows():
    assert named(None) == "baseline"
    assert named("act") == "act"
    assert named([GAMMA]) == '[{"method": "zerotuning", "gamma": 0.5}]'
