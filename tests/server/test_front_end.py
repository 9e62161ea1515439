import pytest
from prometheus_client import CollectorRegistry

from calibrators import registry
from server.admission import Admission
from server.engine.payload import KEY, Payload, Report, Tally
from server.engine.text_pass import OUTPUTS
from server.front_end import FrontEnd
from server.metrics import Metrics
from server.middleware.keys import CURRENT
from server.middleware.request_log import Record


@pytest.fixture
def front_end(make_facts):
    admission = Admission(registry.load(), make_facts(modality="vision"), "model")
    metrics = Metrics(registry.BUILT_IN, "0.32.0", "cpu", CollectorRegistry())
    return FrontEnd(admission, metrics, b"key")


def test_a_request_says_in_which_layers_it_needs_a_text_pass(front_end):
    admitted = front_end.admission.admit({"method": "vhr", "layers": [3, 0]})
    entry = front_end.desk.issue(front_end.open(admitted, 1))
    assert Payload.from_extra_args(entry).text_layers == (0, 3)
    plain = front_end.admission.admit({"method": "zerotuning", "gamma": 2.0})
    entry = front_end.desk.issue(front_end.open(plain, 1))
    assert entry[KEY]["text_layers"] == []


def test_a_report_of_a_text_pass_reaches_no_receipt(front_end):
    admitted = front_end.admission.admit("vhr")
    receipt = front_end.open(admitted, 1)
    front_end.desk.issue(receipt)
    ticket = f"{receipt.tickets[0]}-text"
    front_end.preludes._seen[ticket] = {}
    front_end.report(Report(ticket, [Tally(details={OUTPUTS: {"1": "seen"}})]), 0)
    assert front_end.preludes._seen == {ticket: {"1": "seen"}}
    assert [tally.details for _, tally in receipt.totals()] == [{}]
    front_end.report(Report(receipt.tickets[0], [Tally(prompt_tokens=4)]), 0)
    assert [tally.prompt_tokens for _, tally in receipt.totals()] == [4]


def salt_of(front_end, tenant, salt):
    token = CURRENT.set(tenant)
    try:
        return front_end.tenant_salt(salt)
    finally:
        CURRENT.reset(token)


def test_salts_of_tenants_differ_and_those_of_one_do_not(front_end):
    cases = [("a", None), ("a", "x"), ("b", None), ("b", "x"), ("a", "b"), ("a", "")]
    salts = [salt_of(front_end, *case) for case in cases]
    assert len(set(salts)) == len(cases)
    assert salts == [salt_of(front_end, *case) for case in cases]
    assert all(len(salt) == 64 and set(salt) <= set("0123456789abcdef") for salt in salts)


def test_no_salt_can_be_made_without_the_secret(front_end):
    first = salt_of(front_end, "a", "x")
    front_end.salt_key = b"another"
    assert salt_of(front_end, "a", "x") != first


@pytest.mark.parametrize("salt", [None, "x"])
def test_without_keys_the_salt_is_the_clients(front_end, salt):
    assert salt_of(front_end, None, salt) == salt


@pytest.mark.parametrize(("answered", "outcome"), [(True, "applied"), (False, "failed")])
def test_the_log_is_told_how_a_calibrated_request_ended(front_end, answered, outcome):
    log = Record()
    admitted = front_end.admission.admit({"method": "zerotuning", "gamma": 2.0})
    receipt = front_end.open(admitted, 1, log)
    front_end.desk.issue(receipt)
    front_end.report(Report(receipt.tickets[0], [Tally(prompt_tokens=4)]), 0)
    front_end.close(receipt, answered=answered)
    assert log.outcome == outcome


def test_a_span_tells_what_was_calibrated(front_end):
    admitted = front_end.admission.admit({"method": "zerotuning", "gamma": 2.0})
    receipt = front_end.open(admitted, 1)
    front_end.desk.issue(receipt)
    report = Report(receipt.tickets[0], [Tally(prompt_tokens=4, completion_tokens=2)])
    front_end.report(report, 0)
    assert front_end.attributes(report) == {
        "trimtab.calibration.methods": "zerotuning",
        "trimtab.calibration.digest": admitted.short_digest,
        "trimtab.calibration.outcome": "applied",
        "trimtab.calibration.prompt_tokens": 4,
        "trimtab.calibration.completion_tokens": 2,
    }
    front_end.close(receipt, answered=True)
    assert front_end.attributes(report) == {}
