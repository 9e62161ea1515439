import time
from types import SimpleNamespace

import pytest

from server.engine.payload import KEY, Report, Tally
from server.engine.reports import listen, on_shutdown


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


class FakeEngine:
    """An engine client that is shut down; `pending` counts what still runs, look by look."""

    def __init__(self, manager, pending=(), calls=None):
        self.engine_core = SimpleNamespace(resources=SimpleNamespace(engine_manager=manager))
        self.pending = list(pending)
        self.calls = calls

    def get_num_unfinished_requests(self):
        return self.pending.pop(0)

    def shutdown(self, timeout=None):
        self.calls.append(timeout)
        return "down"


def test_shutdown_is_announced_first():
    calls = []
    engine = FakeEngine(manager="ours", calls=calls)
    on_shutdown(engine, lambda seconds: calls.append(f"announced {seconds}"))
    assert engine.shutdown(timeout=2) == "down"
    assert calls == ["announced 2", pytest.approx(2, abs=0.5)]


def test_what_the_announcement_takes_is_taken_off():
    calls = []
    engine = FakeEngine(manager="ours", calls=calls)
    on_shutdown(engine, lambda seconds: time.sleep(0.02))
    engine.shutdown(timeout=0.01)
    assert calls == [0]


def test_one_api_server_of_several_waits_for_its_requests():
    calls = []
    engine = FakeEngine(manager=None, pending=[2, 1, 0], calls=calls)
    on_shutdown(engine, lambda seconds: calls.append("announced"))
    engine.shutdown(timeout=60)
    assert engine.pending == []
    assert calls == ["announced", pytest.approx(60, abs=5)]


@pytest.mark.parametrize("timeout", [0, None])
def test_without_time_to_drain_it_does_not_wait(timeout):
    calls = []
    engine = FakeEngine(manager=None, pending=[1, 1], calls=calls)
    on_shutdown(engine, lambda seconds: None)
    engine.shutdown(timeout=timeout)
    assert engine.pending == [1]
    assert calls == [timeout]
