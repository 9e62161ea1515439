from types import SimpleNamespace

import pytest

from server.engine.payload import KEY, Report, Tally
from server.engine.reports import listen


class FakeProcessor:
    """vLLM's output processor, as far as it is touched."""

    def __init__(self, **indices):
        self.request_states = {
            request_id: SimpleNamespace(request_index=index)
            for request_id, index in indices.items()
        }
        self.log = []

    def process_outputs(self, outputs, *args, **kwargs):
        seen = [(output.request_id, output.kv_transfer_params) for output in outputs]
        self.log.append((seen, args, kwargs))
        # vLLM forgets a request here once it has finished.
        self.request_states.clear()
        return "processed"


@pytest.fixture
def listening():
    """A processor that is listened to, and what was heard."""

    def make(**indices):
        processor, heard = FakeProcessor(**indices), []

        def on_report(report, choice):
            heard.append((report, choice, len(processor.log)))

        listen(SimpleNamespace(output_processor=processor), on_report)
        return processor, heard

    return make


def report(ticket="ticket"):
    return Report(ticket, [Tally(3, 1, {"m": 0.5}, 2)], {"zerotuning": 0.1})


def test_reports_are_heard_before_their_output_is_processed(listening, make_output):
    processor, heard = listening(a=0, b=2)
    outputs = [
        make_output("a", {KEY: report("one").to_transfer_params()}),
        make_output("b", {KEY: report("two").to_transfer_params()}),
    ]
    assert processor.process_outputs(outputs, "stats", flag=True) == "processed"
    assert heard == [(report("one"), 0, 0), (report("two"), 2, 0)]
    assert processor.log == [([("a", None), ("b", None)], ("stats",), {"flag": True})]


def test_other_parameters_stay(listening, make_output):
    processor, _ = listening(a=0)
    params = {KEY: report().to_transfer_params(), "remote_block_ids": [1]}
    processor.process_outputs([make_output("a", params)])
    assert processor.log[0][0] == [("a", {"remote_block_ids": [1]})]


@pytest.mark.parametrize("params", [None, {"remote_block_ids": [1]}])
def test_outputs_without_a_report_pass_untouched(listening, make_output, params):
    processor, heard = listening(a=0)
    output = make_output("a", params)
    processor.process_outputs([output])
    assert heard == []
    assert output.kv_transfer_params is params


def test_an_aborted_request_is_not_reported_and_shows_nothing(listening, make_output):
    processor, heard = listening()
    processor.process_outputs([make_output("a", {KEY: report().to_transfer_params()})])
    assert heard == []
    assert processor.log[0][0] == [("a", None)]
