import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from calibrators.interface import Bound
from server import __version__
from server.admission import REASONS, Admitted, Refusal
from server.engine.payload import Report, Tally
from server.engine.text_pass import NAME
from server.metrics import (
    FAMILIES,
    MOMENTS,
    OUTCOMES,
    OVERLOADED,
    PHASES,
    PROFILE_OUTCOMES,
    Metrics,
)
from server.receipts import Receipt

NAMES = ("zerotuning", "vhr")


class Scraped(Metrics):
    """Metrics with a registry of their own and a look at what it exports."""

    def __init__(self):
        self.registry = CollectorRegistry()
        super().__init__(NAMES, "0.32.0", "cpu", self.registry)

    def samples(self):
        text = generate_latest(self.registry).decode()
        return [
            sample
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if not sample.name.endswith("_created")
        ]

    def value(self, name, **labels):
        found = [s.value for s in self.samples() if s.name == name and s.labels == labels]
        assert len(found) == 1, (name, labels)
        return found[0]


@pytest.fixture
def metrics():
    return Scraped()


def make_receipt(*tallies, methods=("zerotuning",)):
    bounds = tuple(Bound(method, {}, 1, 1) for method in methods)
    receipt = Receipt(Admitted(bounds, "d" * 64, True, True), choices=1)
    receipt.issue()
    if tallies:
        receipt.record(Report(receipt.tickets[0], tallies), 0)
    return receipt


def test_every_family_is_exported_and_no_other(metrics):
    suffixes = ("_bucket", "_count", "_sum")
    stems = set()
    for sample in metrics.samples():
        suffix = next((s for s in suffixes if sample.name.endswith(s)), "")
        stems.add(sample.name.removesuffix(suffix))
    assert stems == FAMILIES
    assert all(name.startswith("trimtab_") and ":" not in name for name in FAMILIES)


@pytest.mark.parametrize(
    ("name", "combinations"),
    [
        (
            "trimtab_requests_total",
            [{"calibrator": n, "outcome": o} for n in NAMES for o in OUTCOMES],
        ),
        (
            "trimtab_calibrated_tokens_total",
            [{"calibrator": n, "phase": p} for n in NAMES for p in PHASES],
        ),
        ("trimtab_rejections_total", [{"reason": reason} for reason in (*REASONS, OVERLOADED)]),
        ("trimtab_calibration_seconds_count", [{"calibrator": n} for n in NAMES]),
        ("trimtab_active_requests", [{"calibrator": n} for n in NAMES]),
        (
            "trimtab_sink_mass_ratio_count",
            [{"calibrator": n, "when": m} for n in NAMES for m in MOMENTS],
        ),
        ("trimtab_profile_loads_total", [{"outcome": o} for o in PROFILE_OUTCOMES]),
    ],
)
def test_every_known_label_value_is_zero_at_the_start(metrics, name, combinations):
    found = {tuple(sorted(s.labels.items())): s.value for s in metrics.samples() if s.name == name}
    assert found == {tuple(sorted(labels.items())): 0 for labels in combinations}


def test_profiles_that_were_loaded_are_counted(metrics):
    metrics.profiles_loaded(3)
    assert metrics.value("trimtab_profile_loads_total", outcome="loaded") == 3
    assert metrics.value("trimtab_profile_loads_total", outcome="refused") == 0


def test_build_info(metrics):
    labels = {"version": __version__, "vllm_version": "0.32.0", "device": "cpu"}
    assert metrics.value("trimtab_build_info", **labels) == 1


def test_a_registry_of_ones_own_is_the_only_one_touched(metrics):
    names = {metric.name for metric in REGISTRY.collect()}
    assert not {name for name in names if name.startswith("trimtab")}
    assert Scraped().samples() == metrics.samples()


def test_an_answered_request(metrics):
    sums = {"key0_mass_before": 2.4, "key0_mass_after": 0.4}
    receipt = make_receipt(Tally(41, 16, sums, count=4))
    metrics.opened(receipt)
    assert metrics.value("trimtab_active_requests", calibrator="zerotuning") == 1
    metrics.closed(receipt, answered=True)
    assert metrics.value("trimtab_active_requests", calibrator="zerotuning") == 0
    tokens = "trimtab_calibrated_tokens_total"
    assert metrics.value(tokens, calibrator="zerotuning", phase="prompt") == 41
    assert metrics.value(tokens, calibrator="zerotuning", phase="completion") == 16
    requests = {
        outcome: metrics.value("trimtab_requests_total", calibrator="zerotuning", outcome=outcome)
        for outcome in OUTCOMES
    }
    assert requests == {"applied": 1, "skipped": 0, "rejected": 0, "failed": 0}
    ratio = "trimtab_sink_mass_ratio"
    for moment, value in {"before": 0.6, "after": 0.1}.items():
        labels = {"calibrator": "zerotuning", "when": moment}
        assert metrics.value(f"{ratio}_count", **labels) == 1
        assert metrics.value(f"{ratio}_sum", **labels) == pytest.approx(value)


def test_a_request_that_failed_still_counts_what_was_done(metrics):
    receipt = make_receipt(Tally(41, 3))
    metrics.opened(receipt)
    metrics.closed(receipt, answered=False)
    tokens = "trimtab_calibrated_tokens_total"
    assert metrics.value(tokens, calibrator="zerotuning", phase="prompt") == 41
    requests = "trimtab_requests_total"
    assert metrics.value(requests, calibrator="zerotuning", outcome="failed") == 1
    assert metrics.value(requests, calibrator="zerotuning", outcome="applied") == 0


def test_a_request_without_a_report_is_closed_all_the_same(metrics):
    receipt = make_receipt()
    metrics.opened(receipt)
    metrics.closed(receipt, answered=False)
    assert metrics.value("trimtab_active_requests", calibrator="zerotuning") == 0
    requests = "trimtab_requests_total"
    assert metrics.value(requests, calibrator="zerotuning", outcome="failed") == 1


def test_both_methods_of_a_request_count(metrics):
    receipt = make_receipt(Tally(5, 1), Tally(2, 0), methods=("zerotuning", "vhr"))
    metrics.opened(receipt)
    metrics.closed(receipt, answered=True)
    tokens = "trimtab_calibrated_tokens_total"
    assert metrics.value(tokens, calibrator="zerotuning", phase="prompt") == 5
    assert metrics.value(tokens, calibrator="vhr", phase="prompt") == 2


def test_refusals_count_by_reason_and_method(metrics):
    metrics.refused(Refusal("malformed", "calibration", "what"))
    metrics.refused(Refusal("invalid_parameter", "calibration.gamma", "no", "zerotuning"))
    for reason, count in {"malformed": 1, "invalid_parameter": 1, "combination": 0}.items():
        assert metrics.value("trimtab_rejections_total", reason=reason) == count
    rejected = {"calibrator": "zerotuning", "outcome": "rejected"}
    assert metrics.value("trimtab_requests_total", **rejected) == 1


def test_a_request_refused_late_is_no_longer_active(metrics):
    receipt = make_receipt()
    metrics.opened(receipt)
    metrics.withdrawn(receipt)
    metrics.refused(Refusal("unsupported_feature", "calibration", "no", "zerotuning"))
    assert metrics.value("trimtab_active_requests", calibrator="zerotuning") == 0
    for outcome, count in {"rejected": 1, "failed": 0, "applied": 0}.items():
        labels = {"calibrator": "zerotuning", "outcome": outcome}
        assert metrics.value("trimtab_requests_total", **labels) == count


def test_seconds_are_observed_where_a_report_has_them(metrics):
    metrics.stepped(Report("ticket", [], {"zerotuning": 0.002}))
    metrics.stepped(Report("ticket", []))
    metrics.stepped(Report("ticket", [], {NAME: 0.5}))
    assert NAME not in generate_latest(metrics.registry).decode()
    labels = {"calibrator": "zerotuning"}
    assert metrics.value("trimtab_calibration_seconds_count", **labels) == 1
    assert metrics.value("trimtab_calibration_seconds_sum", **labels) == pytest.approx(0.002)
    assert metrics.value("trimtab_calibration_seconds_count", calibrator="vhr") == 0


def test_a_request_refused_for_lack_of_room_is_counted(metrics):
    metrics.overloaded()
    name = "trimtab_rejections_total"
    found = {s.labels["reason"]: s.value for s in metrics.samples() if s.name == name}
    assert found == dict.fromkeys(REASONS, 0) | {OVERLOADED: 1}
