import json

import msgspec
import pytest

from calibrators.interface import Prefill, Prompt, Span
from server.engine.payload import KEY, Payload, Report, Tally

TALLIES = [
    Tally(5, 2, {"key0_mass_before": 0.25}, 7, {"sinks": 3.0}, {"sinks": 2}, cached=4),
    Tally(heads=3, details={"heads_selected": {"1": [0, 2]}}, skipped="no sink"),
]
IMAGES = Span(2, 9), Span(11, 12)
PROMPT = Prompt(40, IMAGES, (Span(20, 30),), (Span(21, 23), Span(22, 24)), (Span(2, 12),))


@pytest.mark.parametrize("prompt", [None, Prompt(3), PROMPT], ids=["none", "bare", "full"])
def test_a_payload_survives_the_way_down(bound, prompt):
    payload = Payload("ticket", (bound, bound), Prefill.WHOLE, shareable=False, prompt=prompt)
    entry = payload.to_extra_args()
    carried = msgspec.msgpack.decode(msgspec.msgpack.encode(entry))
    assert json.loads(json.dumps(entry)) == carried
    assert Payload.from_extra_args({KEY: carried, "other": 1}) == payload


@pytest.mark.parametrize("extra_args", [None, {}, {"other": 1}])
def test_plain_requests_have_none(extra_args):
    assert Payload.from_extra_args(extra_args) is None


@pytest.mark.parametrize("forged", ["x", 1, 1.5, ["ticket"], None])
def test_what_clients_can_send_is_no_payload(forged):
    """`vllm_xargs` carries scalars and lists of them."""
    assert Payload.from_extra_args({KEY: forged}) is None


@pytest.mark.parametrize("seconds", [None, {"zerotuning": 0.25}])
def test_a_report_survives_the_way_up(seconds):
    report = Report("ticket", TALLIES, seconds)
    carried = msgspec.msgpack.decode(msgspec.msgpack.encode(report.to_transfer_params()))
    assert Report.from_transfer_params({KEY: carried, "other": 1}) == report


@pytest.mark.parametrize("params", [None, {}, {"do_remote_decode": True}])
def test_outputs_without_a_report(params):
    assert Report.from_transfer_params(params) is None


def test_a_report_on_its_way_is_a_snapshot():
    tally = Tally(prompt_tokens=1, sums={"a": 1.0}, details={"d": {"0": 1}})
    params = Report("ticket", [tally]).to_transfer_params()
    tally.prompt_tokens = 2
    tally.sums["a"] = 2.0
    tally.details["d"]["1"] = 2
    (arrived,) = Report.from_transfer_params({KEY: params}).tallies
    assert arrived == Tally(1, 0, {"a": 1.0}, details={"d": {"0": 1}})


@pytest.mark.parametrize(
    ("counts", "skip"),
    [({}, "why"), ({"prompt_tokens": 3, "cached": 3}, "why"), ({"prompt_tokens": 1}, None)],
)
def test_what_was_rewritten_is_not_skipped(counts, skip):
    assert Tally(skipped="why", **counts).skip == skip
    assert Tally(skipped="why", completion_tokens=1, **counts).skip is None
    assert Tally(**counts).skip is None
