"""Calibration on the spans that vLLM writes for requests.

vLLM makes a span of a request when it is over, and takes no attributes of others. So they are added
where OpenTelemetry lets everybody add some: when a span starts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider

from server.engine.payload import Report

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from vllm.engine.protocol import EngineClient
    from vllm.v1.engine import EngineCoreOutput

Attributes = Mapping[str, str | int]
_current: ContextVar[Attributes | None] = ContextVar("calibration", default=None)


class CalibrationSpans(SpanProcessor):
    """Adds what is current to every span that starts."""

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:  # noqa: ARG002
        """Called by OpenTelemetry, in the context that starts the span."""
        span.set_attributes(_current.get() or {})

    def on_end(self, span: ReadableSpan) -> None:
        """Nothing is left to say."""


def trace_calibration(
    engine_client: EngineClient, attributes: Callable[[Report], Attributes]
) -> None:
    """Put `attributes(report)` on the span of every request whose last output carries a report.

    Does nothing where vLLM does not trace. Comes after `listen`, so that outputs pass here first:
    that one takes the reports out.
    """
    provider = trace.get_tracer_provider()
    if not isinstance(provider, TracerProvider):
        return
    provider.add_span_processor(CalibrationSpans())
    processor = engine_client.output_processor
    process, write = processor.process_outputs, processor.do_tracing
    reports: dict[str, Report] = {}

    def process_outputs(outputs: Sequence[EngineCoreOutput], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        for output in outputs:
            report = Report.from_transfer_params(output.kv_transfer_params)
            if report is not None:
                reports[output.request_id] = report
        try:
            return process(outputs, *args, **kwargs)
        finally:
            reports.clear()

    def do_tracing(output: EngineCoreOutput, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        report = reports.get(output.request_id)
        token = _current.set(None if report is None else attributes(report))
        try:
            write(output, *args, **kwargs)
        finally:
            _current.reset(token)

    processor.process_outputs = process_outputs
    processor.do_tracing = do_tracing
