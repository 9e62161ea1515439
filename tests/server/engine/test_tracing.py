"""Spans as OpenTelemetry exports them, of a processor that traces as vLLM's does."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from server.engine.payload import KEY, Report, Tally
from server.engine.reports import listen
from server.engine.tracing import trace_calibration


class Processor:
    """vLLM's output processor, as far as spans go."""

    def __init__(self, provider):
        self.request_states = {}
        self.tracer = provider.get_tracer("vllm")

    def process_outputs(self, outputs, *args):
        for output in outputs:
            self.do_tracing(output, "state", None)
        return len(outputs)

    def do_tracing(self, output, state, stats):
        self.tracer.start_span("llm_request").end()


@pytest.fixture
def traced(monkeypatch):
    """A processor whose outputs are traced, and its spans."""
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    processor = Processor(provider)
    client = SimpleNamespace(output_processor=processor)
    listen(client, lambda report, choice: None)
    trace_calibration(client, lambda report: {"digest": report.ticket[:3]})
    return processor, exporter


def calibrated(make_output, request_id, ticket):
    report = Report(ticket, [Tally(3, 1)])
    return make_output(request_id, {KEY: report.to_transfer_params()})


def test_a_calibrated_request_has_its_calibration_on_its_span(traced, make_output):
    processor, exporter = traced
    outputs = [
        calibrated(make_output, "a", "one-ticket"),
        make_output("b", None),
        calibrated(make_output, "c", "two-ticket"),
    ]
    assert processor.process_outputs(outputs, "stats") == 3
    found = [dict(span.attributes) for span in exporter.get_finished_spans()]
    assert found == [{"digest": "one"}, {}, {"digest": "two"}]


def test_nothing_is_left_for_the_next(traced, make_output):
    processor, exporter = traced
    processor.process_outputs([calibrated(make_output, "a", "one-ticket")])
    processor.process_outputs([make_output("a", None)])
    assert [dict(span.attributes) for span in exporter.get_finished_spans()][1] == {}


def test_where_vllm_does_not_trace_nothing_is_wrapped(monkeypatch):
    monkeypatch.setattr(trace, "get_tracer_provider", trace.NoOpTracerProvider)
    client = SimpleNamespace(output_processor=object())
    trace_calibration(client, lambda report: {})
