import pytest

from benchmarks import throughput
from benchmarks.load import Round
from benchmarks.throughput import SCENARIOS, Comparison
from server.overhead.spread import Spread


def plan_of(tmp_path, *arguments):
    arguments = ("--model", str(tmp_path), *arguments)
    return throughput._plan(throughput._parser().parse_args(arguments))


def rounds(*seconds):
    return [Round(value, (value, value / 2)) for value in seconds]


def test_throughput_is_plain_seconds_over_calibrated_seconds():
    compared = throughput._compared("x", rounds(1.0, 1.0), rounds(2.0, 4.0), spent=1.5)

    assert compared.throughput == Spread(0.375, 0.25, 0.5)
    assert compared.latency == Spread(3.0, 2.0, 4.0)
    assert compared.calibration_share == pytest.approx(0.25)


def test_the_report_has_a_line_per_comparison():
    results = [
        Comparison("plain-vs-stock", [1.0], [1.0], Spread(1.0, 1.0, 1.0)),
        Comparison("one", [1.0], [2.0], Spread(0.5, 0.4, 0.6), Spread(2.0, 2.0, 2.0), 0.123),
    ]
    lines = throughput.report(results).splitlines()

    assert len(lines) == 4
    assert "1.000 (1.000..1.000)" in lines[2]
    assert "0.500 (0.400..0.600)" in lines[3]
    assert "12.3%" in lines[3]


def test_all_scenarios_run_by_default(tmp_path):
    plan = plan_of(tmp_path)

    assert plan.scenarios == tuple(SCENARIOS)
    assert plan.starts >= 2


def test_quick_runs_fewer_rounds(tmp_path):
    quick, full = plan_of(tmp_path, "--quick"), plan_of(tmp_path)

    assert quick.rounds < full.rounds
    assert quick.starts < full.starts


def test_any_calibration_may_be_measured(tmp_path):
    assert plan_of(tmp_path).calibration == {"method": "zerotuning", "gamma": 0.5}
    act = plan_of(tmp_path, "--calibration", '{"method": "act", "heads": [1, 5]}')
    assert act.calibration == {"method": "act", "heads": [1, 5]}


def test_an_unknown_scenario_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="no scenario 'x'"):
        plan_of(tmp_path, "--scenarios", "decode-200,x")


def test_no_scenario_leaves_the_comparison_with_stock_alone(tmp_path):
    assert plan_of(tmp_path, "--scenarios", "").scenarios == ()


def test_images_are_measured_without_stock_by_default(tmp_path):
    plan = plan_of(tmp_path, "--images")

    assert (plan.scenarios, plan.starts) == (tuple(throughput.IMAGES), 0)
    with pytest.raises(SystemExit, match="no scenario 'decode-200'"):
        plan_of(tmp_path, "--images", "--scenarios", "decode-200")
