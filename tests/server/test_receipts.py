import pytest

from calibrators.interface import Bound
from server.admission import Admitted
from server.engine.payload import KEY, Payload, Report, Tally
from server.receipts import NotApplied, Receipt, ReceiptDesk, statistics, total

ZERO = Bound("zerotuning", {"gamma": 0.5, "layers": "all", "heads": "all"}, 4, 24)
HEADS = Bound("heads", {"alpha": 2.0}, 1, 3, profile="tuned")


def make_receipt(*bounds, choices=1):
    return Receipt(Admitted(bounds or (ZERO,), "ab" * 32, True, True), choices)


def tally(prompt=0, completion=0, count=0, **sums):
    return Tally(prompt, completion, sums, count)


def test_a_ticket_is_issued_per_prompt_and_never_twice():
    receipts = [make_receipt(), make_receipt()]
    entries = [receipt.issue() for receipt in receipts for _ in range(3)]
    payloads = [Payload.from_extra_args(entry) for entry in entries]
    assert len({payload.ticket for payload in payloads}) == 6
    assert all(payload.calibrations == (ZERO,) for payload in payloads)
    assert [*receipts[0].tickets, *receipts[1].tickets] == [p.ticket for p in payloads]


def test_a_document_before_any_report_is_refused():
    receipt = make_receipt()
    receipt.issue()
    with pytest.raises(NotApplied):
        receipt.document()


def test_the_document_of_one_choice():
    receipt = make_receipt()
    receipt.issue()
    before_and_after = {"key0_mass_before": 4.0, "key0_mass_after": 2.0}
    receipt.record(Report(receipt.tickets[0], [tally(41, 16, 8, **before_and_after)]), 0)
    assert receipt.document() == {
        "digest": "ab" * 6,
        "applied": [
            {
                "method": "zerotuning",
                "params": {"gamma": 0.5, "layers": "all", "heads": "all"},
                "profile": None,
                "layers": 4,
                "heads": 24,
                "prompt_tokens": 41,
                "completion_tokens": 16,
                "statistics": {"key0_mass_before": 0.5, "key0_mass_after": 0.25},
                "skipped": None,
            }
        ],
    }


def test_later_reports_replace_earlier_ones():
    receipt = make_receipt()
    receipt.issue()
    for completion in (0, 1, 2):
        receipt.record(Report(receipt.tickets[0], [tally(5, completion)]), 0)
    assert receipt.document()["applied"][0]["completion_tokens"] == 2


def test_choices_are_numbered_as_in_the_response_over_all_prompts():
    receipt = make_receipt(choices=2)
    receipt.issue()
    receipt.issue()
    reports = {(0, 0): 10, (0, 1): 11, (1, 0): 20, (1, 1): 21}
    for (prompt, choice), completion in sorted(reports.items(), reverse=True):
        report = Report(receipt.tickets[prompt], [tally(100, completion, 2, m=completion)])
        receipt.record(report, choice)
    entry = receipt.document()["applied"][0]
    assert [c["index"] for c in entry["choices"]] == [0, 1, 2, 3]
    assert "heads" not in entry["choices"][0]
    assert [c["completion_tokens"] for c in entry["choices"]] == [10, 11, 20, 21]
    assert [c["statistics"]["m"] for c in entry["choices"]] == [5, 5.5, 10, 10.5]
    assert (entry["prompt_tokens"], entry["completion_tokens"]) == (400, 62)
    assert entry["statistics"] == {"m": 62 / 8}


@pytest.mark.parametrize("missing", [0, 1])
def test_one_uncounted_choice_is_enough_to_refuse(missing):
    receipt = make_receipt(choices=2)
    receipt.issue()
    receipt.record(Report(receipt.tickets[0], [tally(1)]), 1 - missing)
    with pytest.raises(NotApplied):
        receipt.document()


def test_each_calibration_has_its_own_entry():
    receipt = make_receipt(ZERO, HEADS)
    receipt.issue()
    receipt.record(Report(receipt.tickets[0], [tally(5, 1), tally(2, 1)]), 0)
    first, second = receipt.document()["applied"]
    assert (first["method"], first["prompt_tokens"]) == ("zerotuning", 5)
    assert (second["method"], second["prompt_tokens"]) == ("heads", 2)
    assert (second["profile"], second["params"]) == ("tuned", {"alpha": 2.0})


def test_totals_leave_the_tallies_alone():
    tallies = [tally(1, 2, 3, a=1.0), tally(10, 20, 30, a=2.0, b=5.0)]
    assert total(tallies) == tally(11, 22, 33, a=3.0, b=5.0)
    assert total(tallies) == tally(11, 22, 33, a=3.0, b=5.0)
    assert total([]) == Tally()


def test_statistics_are_means_and_absent_without_measurements():
    assert statistics(tally(count=4, a=2.0)) == {"a": 0.5}
    assert statistics(tally(a=2.0)) == {}


def test_statistics_of_layers_are_means_over_layers_and_choices():
    tallies = [
        Tally(layer_sums={"s": 6.0}, layer_counts={"s": 2}),
        Tally(layer_sums={"s": 3.0, "t": 5.0}, layer_counts={"s": 1, "t": 1}),
    ]
    assert statistics(total(tallies)) == {"s": 3.0, "t": 5.0}
    assert statistics(total([*tallies, tally(count=4, a=2.0)])) == {"a": 0.5, "s": 3.0, "t": 5.0}


def shown(*tallies):
    receipt = make_receipt(HEADS, choices=len(tallies))
    receipt.issue()
    for choice, each in enumerate(tallies):
        receipt.record(Report(receipt.tickets[0], [each]), choice)
    return receipt.document()["applied"][0]


def test_a_skip_is_shown_with_its_reason_and_without_rows():
    entry = shown(Tally(prompt_tokens=4, cached=4, layer_sums={"s": 0.0}, layer_counts={"s": 2}))
    assert (entry["skipped"], entry["prompt_tokens"]) == (None, 4)
    entry = shown(Tally(prompt_tokens=4, cached=4, skipped="no sink"))
    assert (entry["skipped"], entry["prompt_tokens"], entry["heads"]) == ("no sink", 0, 3)
    assert shown(Tally(prompt_tokens=4, skipped="no sink"))["skipped"] is None


def test_only_what_all_choices_skip_is_skipped():
    skipped, applied = Tally(prompt_tokens=3, cached=3, skipped="no sink"), Tally(prompt_tokens=4)
    assert shown(skipped, skipped)["skipped"] == "no sink"
    entry = shown(skipped, applied)
    assert (entry["skipped"], entry["prompt_tokens"]) == (None, 4)
    assert [choice["skipped"] for choice in entry["choices"]] == ["no sink", None]


def test_heads_chosen_for_a_request_are_counted_and_listed():
    one = Tally(1, heads=2, details={"heads_selected": {"1": [0, 2]}})
    other = Tally(1, heads=1, details={"heads_selected": {"1": [0]}})
    entry = shown(one)
    assert (entry["heads"], entry["statistics"]) == (2, {"heads_selected": {"1": [0, 2]}})
    same = shown(one, one)
    assert (same["heads"], same["statistics"]) == (entry["heads"], entry["statistics"])
    entry = shown(one, other)
    assert (entry["heads"], entry["statistics"]) == (None, {})
    assert [choice["heads"] for choice in entry["choices"]] == [2, 1]


def test_the_desk_finds_receipts_by_ticket():
    desk, one, other = ReceiptDesk(), make_receipt(), make_receipt()
    desk.issue(one)
    entry = desk.issue(other)
    ticket = Payload.from_extra_args(entry).ticket
    desk.record(Report(ticket, [tally(7)]), 0)
    assert other.document()["applied"][0]["prompt_tokens"] == 7
    with pytest.raises(NotApplied):
        one.document()


def test_the_desk_forgets_what_is_closed():
    desk, receipt = ReceiptDesk(), make_receipt()
    desk.issue(receipt)
    desk.issue(receipt)
    assert len(desk) == 2
    desk.close(receipt)
    desk.close(receipt)
    assert len(desk) == 0
    desk.record(Report(receipt.tickets[0], [tally(7)]), 0)
    with pytest.raises(NotApplied):
        receipt.document()


def test_the_desk_closes_whatever_happens():
    desk, receipt = ReceiptDesk(), make_receipt()

    def fail():
        with desk.closing(receipt) as opened:
            desk.issue(opened)
            assert len(desk) == 1
            raise KeyError("handler")

    with pytest.raises(KeyError):
        fail()
    assert len(desk) == 0


def test_reports_of_strangers_are_ignored():
    desk = ReceiptDesk()
    desk.record(Report("stranger", [tally(1)]), 0)
    assert len(desk) == 0
    assert KEY in desk.issue(make_receipt())
