"""OpenTelemetry: a span for each request, below it one for each answer and each of its stages.

Where it goes is said by OpenTelemetry's own variables (OTEL_EXPORTER_OTLP_ENDPOINT and the others);
without one of ASKING nothing of OpenTelemetry is imported. A caller's `traceparent` makes its span
the parent of ours. Spans have lengths, times and codes, and nothing of any text.

An answer's stages are what the server's account of it says they took, one after the other from the
time at which it was sent to the server: the two share no clock with whoever reads the spans.
"""

import importlib.util
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, NamedTuple

from nodeserve import __version__
from nodeserve.gateway.meters import Ended
from nodeserve.log import about, logger
from nodeserve.types import Timings
from nodeserve.wire.tracing import STAGES

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
ASKING = ("OTEL_TRACES_EXPORTER", ENDPOINT, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
BY_PROTOCOL = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}
EXPORTERS = "opentelemetry_traces_exporter"  # the group that packages register theirs in
SPAN = "nodeserve.span"  # in a scope: the request's RequestSpan, or None


class Moment(NamedTuple):
    """The same moment on two clocks: that of the day, which spans carry, and ours."""

    time_ns: int
    perf_s: float

    @staticmethod
    def now() -> "Moment":
        return Moment(time.time_ns(), time.perf_counter())

    def ns(self, perf_s: float) -> int:
        return self.time_ns + round(1e9 * (perf_s - self.perf_s))


class Spans:
    """Begins spans of requests; one for each gateway process."""

    def __init__(self, provider: "TracerProvider") -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("nodeserve.gateway", __version__)

    def begin(
        self, method: str, route: str, request_id: str, headers: Mapping[str, str]
    ) -> "RequestSpan":
        """`headers` with names in lower case."""
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind

        began = Moment.now()
        attributes = {
            "http.request.method": method,
            "http.route": route,
            "nodeserve.request_id": request_id,
        }
        span = self._tracer.start_span(
            f"{method} {route}",
            extract(headers),
            SpanKind.SERVER,
            attributes,
            start_time=began.time_ns,
        )
        return RequestSpan(self, span, began)

    def child(self, parent: "Span", name: str, begin_ns: int) -> "Span":
        from opentelemetry.trace import set_span_in_context

        return self._tracer.start_span(name, set_span_in_context(parent), start_time=begin_ns)

    def close(self) -> None:
        """Send what is left; blocks."""
        self._provider.shutdown()


class RequestSpan:
    """Of one request, from its headers to the last byte of its response."""

    def __init__(self, spans: Spans, span: "Span", began: Moment) -> None:
        self._spans = spans
        self._span = span
        self._began = began

    def status(self, status: int) -> None:
        """The response's; one that is the server's fault makes the span an error."""
        from opentelemetry.trace import StatusCode

        self._span.set_attribute("http.response.status_code", status)
        if status >= 500:
            self._span.set_status(StatusCode.ERROR)

    def answers(self, model: str, answers: Sequence[Ended]) -> None:
        """How its answers ended."""
        if not (answers and self._span.is_recording()):
            return
        self._span.set_attributes(
            {
                "gen_ai.provider.name": "nodeserve",
                "gen_ai.request.model": model,
                "gen_ai.response.finish_reasons": [one.reason for one in answers],
                "gen_ai.usage.input_tokens": sum(one.prompt_tokens for one in answers),
                "gen_ai.usage.output_tokens": sum(one.output_tokens for one in answers),
            }
        )
        for number, answer in enumerate(answers):
            self._answer(number, answer)

    def _answer(self, number: int, answer: Ended) -> None:
        sent_ns, ended_ns = self._began.ns(answer.sent_s), self._began.ns(answer.ended_s)
        span = self._spans.child(self._span, f"answer {number}", sent_ns)
        span.set_attribute("nodeserve.reason", answer.reason)
        if (timings := answer.timings) is not None:
            span.set_attributes(
                {
                    "nodeserve.prefill_worker": timings.prefill_worker,
                    "nodeserve.decode_worker": timings.decode_worker,
                    "nodeserve.preemptions": timings.num_preemptions,
                    "nodeserve.handoff_bytes": timings.handoff_bytes,
                }
            )
            begin_ns = sent_ns
            for name, seconds in stages(timings):
                end_ns = begin_ns + round(1e9 * seconds)
                self._spans.child(span, name, begin_ns).end(end_ns)
                begin_ns = end_ns
            ended_ns = max(ended_ns, begin_ns)
        span.end(ended_ns)

    def end(self) -> None:
        self._span.end()


def stages(timings: Timings) -> Iterator[tuple[str, float]]:
    """Those that took time, in their order, by the names that traces have for them."""
    decode_s = timings.decode_s - timings.handoff_wait_s - timings.handoff_s
    seconds = (
        *(timings.scheduler_wait_s, timings.transit_s, timings.device_wait_s),
        *(timings.prefill_s, timings.return_s),
        *(timings.handoff_wait_s, timings.handoff_s, decode_s),
    )
    return ((name, spent) for name, spent in zip(STAGES, seconds, strict=True) if spent > 0.0)


def spans_from(environment: Mapping[str, str]) -> Spans | None:
    """As OpenTelemetry's variables say; None where they ask for nothing, or for what cannot be
    (with a line in the log: nobody is refused an answer for want of a span)."""
    if not any(environment.get(name) for name in ASKING):
        return None
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    if importlib.util.find_spec("opentelemetry") is None or (
        importlib.util.find_spec("opentelemetry.sdk") is None
    ):
        extra = about("no_spans")
        words = "there will be no spans: OpenTelemetry is asked for and not installed"
        logger.warning("%s: pip install 'nodeserve[otel]'", words, extra=extra)
        return None
    exporters = list(exporters_from(environment))
    return Spans(provider_of(exporters)) if exporters else None


def exporters_from(environment: Mapping[str, str]) -> "Iterator[SpanExporter]":
    """Those that packages have registered under the names that are asked for."""
    for name in environment.get("OTEL_TRACES_EXPORTER", "otlp").split(","):
        kind = name.strip()
        if kind in ("", "none"):
            continue
        if kind == "otlp":
            protocols = [environment[one] for one in PROTOCOLS if environment.get(one)]
            protocol = protocols[0] if protocols else "http/protobuf"
            kind = BY_PROTOCOL.get(protocol, protocol)
        found = list(entry_points(group=EXPORTERS, name=kind))
        if found:
            yield found[0].load()()
        else:
            words = "no spans to %r: no package that is installed exports them"
            logger.warning(words, kind, extra=about("no_spans", exporter=kind))


def provider_of(exporters: "Sequence[SpanExporter]") -> "TracerProvider":
    """Spans of this service, sent in batches by a thread of their own."""
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "nodeserve"}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    for exporter in exporters:
        provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider
