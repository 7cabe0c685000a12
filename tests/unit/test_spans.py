"""OpenTelemetry's spans of the gateway: what is in them, whose children they are, and when none."""

import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from nodeserve.gateway.meters import Ended
from nodeserve.gateway.settings import GatewaySettings
from nodeserve.gateway.spans import Spans, exporters_from, provider_of, spans_from, stages
from nodeserve.types import Timings
from tests.fakes.gateway import gateway_on, http_client, sdk
from tests.fakes.server import TIMINGS, FakeServer, endless, saying

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = "a-word-of-mine"
BODY = {"model": "fake", "prompt": SECRET, "max_tokens": 5}


class Gathered:
    """Spans that have ended."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.spans = Spans(provider)

    def all(self) -> Sequence[ReadableSpan]:
        return self.exporter.get_finished_spans()

    def one(self, name: str) -> ReadableSpan:
        (found,) = [span for span in self.all() if span.name == name]
        return found

    def below(self, parent: ReadableSpan) -> list[ReadableSpan]:
        """In the order in which they began."""
        found = [
            span
            for span in self.all()
            if span.parent is not None and span.parent.span_id == parent.context.span_id
        ]
        return sorted(found, key=lambda span: span.start_time or 0)


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None and span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


@pytest.fixture
def gathered() -> Gathered:
    return Gathered()


@pytest.fixture
async def http(server: FakeServer, gathered: Gathered, tmp_path: Path) -> AsyncIterator[Path]:
    path = tmp_path / "http"
    async with gateway_on(path, GatewaySettings(socket=str(server.path)), gathered.spans):
        yield path


async def test_a_request_its_answers_and_their_stages(http: Path, gathered: Gathered) -> None:
    async with http_client(http) as client:
        reply = await client.post(
            "/v1/completions", json={**BODY, "n": 2}, headers={"x-request-id": "mine"}
        )
    assert reply.status_code == 200
    request = gathered.one("POST /v1/completions")
    assert request.kind is SpanKind.SERVER and request.parent is None
    assert request.status.status_code is StatusCode.UNSET
    attributes = dict(request.attributes or {})
    assert attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "nodeserve.request_id": "mine",
        "gen_ai.provider.name": "nodeserve",
        "gen_ai.request.model": "fake",
        "gen_ai.response.finish_reasons": ("length", "length"),
        "gen_ai.usage.input_tokens": 2 * len(SECRET),
        "gen_ai.usage.output_tokens": 6,
    }
    answers = gathered.below(request)
    assert [span.name for span in answers] == ["answer 0", "answer 1"]
    for answer in answers:
        parts = gathered.below(answer)
        assert [span.name for span in parts] == ["buffer", "prefill"]
        assert [seconds(span) for span in parts] == [TIMINGS.scheduler_wait_s, TIMINGS.prefill_s]
        assert parts[0].start_time == answer.start_time
        assert parts[0].end_time == parts[1].start_time
        assert (parts[1].end_time or 0) <= (answer.end_time or 0)
        assert (answer.attributes or {})["nodeserve.decode_worker"] == 1
    assert len(gathered.all()) == 7


async def test_a_callers_span_is_the_parent(http: Path, gathered: Gathered) -> None:
    headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
    async with http_client(http) as client:
        await client.get("/v1/models", headers=headers)
        await client.get("/v1/models", headers={"traceparent": "nonsense"})
    ours, alone = gathered.all()
    assert ours.parent is not None and f"{ours.parent.span_id:016x}" == PARENT_ID
    assert f"{ours.context.trace_id:032x}" == TRACE_ID
    assert alone.parent is None


async def test_a_caller_who_does_not_sample_gets_no_spans(http: Path, gathered: Gathered) -> None:
    headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-00"}
    async with http_client(http) as client:
        reply = await client.post("/v1/completions", json=BODY, headers=headers)
    assert reply.status_code == 200 and not gathered.all()


async def test_streams_end_their_spans_with_their_last_event(
    server: FakeServer, http: Path, gathered: Gathered
) -> None:
    server.script = saying("abc")
    async with sdk(http) as client:
        messages: Any = [{"role": "user", "content": SECRET}]
        stream = await client.chat.completions.create(model="fake", messages=messages, stream=True)
        async for _ in stream:
            pass
    span = gathered.one("POST /v1/chat/completions")
    assert dict(span.attributes or {})["gen_ai.usage.output_tokens"] == 3
    assert gathered.one("answer 0").attributes == {
        "nodeserve.reason": "stop",
        "nodeserve.prefill_worker": 0,
        "nodeserve.decode_worker": 1,
        "nodeserve.preemptions": 0,
        "nodeserve.handoff_bytes": 0,
    }


async def test_a_client_that_hangs_up_leaves_an_aborted_answer(
    server: FakeServer, gathered: Gathered, tmp_path: Path
) -> None:
    server.script, path = endless, tmp_path / "http"
    settings = GatewaySettings(socket=str(server.path))
    async with gateway_on(path, settings, gathered.spans), sdk(path) as client:
        stream = await client.completions.create(model="fake", prompt="a", stream=True)
        async for _ in stream:
            break
        await stream.close()
    assert dict(gathered.one("answer 0").attributes or {}) == {"nodeserve.reason": "abort"}


async def test_errors_are_those_of_the_server_only(
    server: FakeServer, http: Path, gathered: Gathered
) -> None:
    async with http_client(http) as client:
        reply = await client.post("/v1/completions", json={**BODY, "temperature": SECRET})
        assert reply.status_code == 400
        server.script = failing
        reply = await client.post("/v1/completions", json=BODY)
        assert reply.status_code == 500
    theirs, ours = [span for span in gathered.all() if span.kind is SpanKind.SERVER]
    assert theirs.status.status_code is StatusCode.UNSET
    assert ours.status.status_code is StatusCode.ERROR
    assert dict(theirs.attributes or {})["http.response.status_code"] == 400
    assert gathered.one("answer 0").attributes == {"nodeserve.reason": "error"}


async def failing(peer: Any, submit: Any) -> None:
    peer.end(submit, "error", 0, "internal", "what happened")


async def test_no_span_has_any_text(http: Path, gathered: Gathered) -> None:
    async with http_client(http) as client:
        await client.post("/v1/completions", json={**BODY, "temperature": SECRET})
        await client.post("/v1/completions", json={**BODY, "stop": SECRET, "user": SECRET})
        await client.post(f"/v1/{SECRET}", json=BODY)
    told = [span.to_json() for span in gathered.all()]
    assert len(told) >= 5 and SECRET not in "".join(told)
    assert gathered.one("POST other")


def test_stages_add_up_to_the_answer() -> None:
    timings = Timings(0.1, 0.2, 0.3, 0.4, 0.5, 0.25, 0.5, 64, 2.0)
    found = dict(stages(timings))
    assert sum(found.values()) == pytest.approx(timings.ttft_s + timings.decode_s)
    assert found["decode"] == 1.25 and found["handoff wait"] == 0.25 and found["handoff"] == 0.5


def test_an_answer_lasts_as_long_as_its_stages(gathered: Gathered) -> None:
    """Which the server has measured, and we only saw the end of."""
    request = gathered.spans.begin("POST", "/x", "1", {})
    request.answers("m", [Ended("stop", 5.0, 5.0, 1, 2, Timings(scheduler_wait_s=3.0))])
    request.end()
    assert seconds(gathered.one("answer 0")) == 3.0


@pytest.mark.parametrize(
    ("environment", "kinds"),
    [
        ({"OTEL_TRACES_EXPORTER": "console"}, ["ConsoleSpanExporter"]),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}, ["OTLPSpanExporter"]),
        ({"OTEL_TRACES_EXPORTER": "otlp, console"}, ["OTLPSpanExporter", "ConsoleSpanExporter"]),
        ({"OTEL_TRACES_EXPORTER": "none"}, []),
        ({"OTEL_TRACES_EXPORTER": "unheard-of"}, []),
    ],
)
def test_the_usual_variables_say_where_to(environment: dict[str, str], kinds: list[str]) -> None:
    found = list(exporters_from(environment))
    assert [type(exporter).__name__ for exporter in found] == kinds
    provider_of(found).shutdown()


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_TRACES_EXPORTER": ""},
        {"OTEL_TRACES_EXPORTER": "console", "OTEL_SDK_DISABLED": "true"},
    ],
)
def test_nobody_asks_and_there_are_none(environment: dict[str, str]) -> None:
    assert spans_from(environment) is None


def test_spans_are_of_this_service_unless_another_name_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, expected in ((None, "nodeserve"), ("mine", "mine")):
        if name is not None:
            monkeypatch.setenv("OTEL_SERVICE_NAME", name)
        provider = provider_of([])
        assert provider.resource.attributes["service.name"] == expected
        provider.shutdown()


def test_without_the_package_it_says_so_and_goes_on() -> None:
    script = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "import logging; logging.basicConfig()\n"
        "from nodeserve.gateway.spans import spans_from\n"
        "print(spans_from({'OTEL_TRACES_EXPORTER': 'console'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "None\n" and "pip install 'nodeserve[otel]'" in done.stderr
