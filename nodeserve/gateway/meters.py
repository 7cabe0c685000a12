"""What a gateway counts of its own work, under the names that dashboards know from vLLM.

Counters only grow, and a scrape changes nothing. Several gateway processes share theirs through
files (prometheus-client's multiprocess mode, set up by the keeper), so that each of them answers a
scrape for all, and what one counted is not lost with it.
"""

import os
import time
from bisect import bisect_left
from typing import NamedTuple

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

from nodeserve.client import Chunk
from nodeserve.gateway.settings import SHARED_METERS
from nodeserve.types import Timings

LABELS = ("model_name", "engine")
TELL_EVERY_S = 0.25
ENGINE = "0"  # a node is one engine
BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5),
    *(0.75, 1.0, 1.5, 2.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0),
)
BUCKETS_TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5)) + (
    1e6,
)
SECONDS = {  # vLLM's name: what it is
    "time_to_first_token_seconds": "From a request's arrival to its first token.",
    "inter_token_latency_seconds": "Between tokens, as they are sent.",
    "request_time_per_output_token_seconds": "(End - first token) / (tokens - 1), of a request.",
    "e2e_request_latency_seconds": "From a request's arrival to its last token.",
    "request_queue_time_seconds": "Until the first pass that has some of its prompt.",
    "request_prefill_time_seconds": "From there to its first token.",
    "request_decode_time_seconds": "From its first token to its last.",
    "request_inference_time_seconds": "Prefill and decode together.",
}
# The same under the name that it had before, which is on many boards still.
GAP_NAME, OLD_GAP_NAME = b"vllm:inter_token_latency_seconds", b"vllm:time_per_output_token_seconds"
TOKENS = {
    "request_prompt_tokens": "Tokens of a prompt.",
    "request_generation_tokens": "Tokens of an answer.",
}


class Meters:
    """One process's. `of` gives those of a model, `text` all of them for a scrape."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = registry = CollectorRegistry()
        self.histograms = {
            name: Histogram(f"vllm:{name}", words, LABELS, registry=registry, buckets=buckets)
            for names, buckets in ((SECONDS, BUCKETS_S), (TOKENS, BUCKETS_TOKENS))
            for name, words in names.items()
        }
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Tokens of prompts.")
        self.output_tokens = self._counter("vllm:generation_tokens", "Tokens sent.")
        self.preemptions = self._counter("vllm:num_preemptions", "Restarts for want of blocks.")
        self.ends = self._counter(
            "vllm:request_success", "Answers by how they ended.", "finished_reason"
        )
        self.objectives = self._counter(
            "nodeserve_slo_requests", "Answers with an SLO in their headers.", "result"
        )
        self.responses = Counter(
            "nodeserve_http_responses",
            "Responses by route and status.",
            ("route", "status"),
            registry=registry,
        )
        self.open = Gauge(
            "nodeserve_gateway_open_requests",
            "Requests for answers that have not ended.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._models: dict[str, ModelMeters] = {}

    def _counter(self, name: str, words: str, *labels: str) -> Counter:
        return Counter(name, words, (*LABELS, *labels), registry=self._registry)

    def of(self, model: str) -> "ModelMeters":
        if model not in self._models:
            self._models[model] = ModelMeters(self, model)
        return self._models[model]

    def text(self) -> bytes:
        """In Prometheus' text format."""
        for model in self._models.values():
            model.sent.tell()
        registry = self._registry
        if SHARED_METERS in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        text = generate_latest(registry)
        gaps = [line for line in text.splitlines(keepends=True) if GAP_NAME in line]
        return text + b"".join(gaps).replace(GAP_NAME, OLD_GAP_NAME)


class ModelMeters:
    """Those of one model, looked up once."""

    def __init__(self, meters: Meters, model: str) -> None:
        labels = (model, ENGINE)
        self.seconds = {n: meters.histograms[n].labels(*labels) for n in (*SECONDS, *TOKENS)}
        gaps = self.seconds["inter_token_latency_seconds"]
        self.prompt_tokens = meters.prompt_tokens.labels(*labels)
        self.sent = Sent(gaps, meters.output_tokens.labels(*labels))
        self.preemptions = meters.preemptions.labels(*labels)
        self.ends = {
            reason: meters.ends.labels(*labels, reason)
            for reason in ("stop", "length", "abort", "error")
        }
        self.objectives = {
            result: meters.objectives.labels(*labels, result)
            for result in ("met", "missed", "refused")
        }


class Sent:
    """Tokens and gaps of all streams, which are tens of thousands a second: added up here, and told
    to the meters when an answer ends, before a scrape, and else every `TELL_EVERY_S` for the scrape
    of another process."""

    def __init__(self, gaps: Histogram, tokens: Counter) -> None:
        self._gaps, self._tokens = gaps, tokens
        self._counts = [0] * (len(BUCKETS_S) + 1)
        self._gaps_s = 0.0
        self._num_tokens = 0
        self._tell_at_s = 0.0

    def tokens(self, count: int) -> None:
        self._num_tokens += count

    def gap(self, gap_s: float, now_s: float) -> None:
        self._counts[bisect_left(BUCKETS_S, gap_s)] += 1
        self._gaps_s += gap_s
        if now_s >= self._tell_at_s:
            self._tell_at_s = now_s + TELL_EVERY_S
            self.tell()

    def tell(self) -> None:
        self._tokens.inc(self._num_tokens)
        self._gaps._sum.inc(self._gaps_s)  # its own methods take one observation at a time
        for bucket, count in zip(self._gaps._buckets, self._counts, strict=True):
            if count:
                bucket.inc(count)
        self._num_tokens, self._gaps_s = 0, 0.0
        self._counts = [0] * len(self._counts)


class Ended(NamedTuple):
    """How an answer ended, which was sent to the server at `sent_s`; times are by perf_counter."""

    reason: str  # stop, length, error or abort
    sent_s: float
    ended_s: float
    prompt_tokens: int
    output_tokens: int
    timings: Timings | None  # the server's account of an answer that ended by itself


class Reading:
    """One answer as it is counted: its chunks, then one of `done`, `failed` or `left`."""

    def __init__(
        self, meters: ModelMeters, began_s: float, num_prompt: int, slo: dict[str, float] | None
    ) -> None:
        self._meters = meters
        self._sent = meters.sent  # looked up once
        self._began_s = began_s
        self._num_prompt = num_prompt
        self._slo = slo
        self._first_s = self._last_s = 0.0
        self._num_tokens = 0
        self._sent_at_s = time.perf_counter()
        self._timings: Timings | None = None
        self.ended: Ended | None = None

    def chunk(self, chunk: Chunk) -> None:
        """A part that is about to be sent."""
        if count := len(chunk.token_ids):
            now_s = time.perf_counter()
            if self._num_tokens:
                self._sent.gap(now_s - self._last_s, now_s)
            else:
                self._first_s = now_s
                self._observe("time_to_first_token_seconds", now_s - self._began_s)
            self._last_s = now_s
            self._num_tokens += count
            self._sent.tokens(count)
        if chunk.finish_reason is not None:
            self._done(chunk.finish_reason, chunk.timings or Timings())

    def failed(self) -> None:
        """Nothing more comes; refused ones never had a token."""
        self._end("error", "missed" if self._num_tokens else "refused")

    def left(self) -> None:
        """The client is gone; harmless after another end."""
        self._end("abort", None)

    def _done(self, reason: str, timings: Timings) -> None:
        if self.ended is not None:
            return
        self._timings = timings
        self._meters.prompt_tokens.inc(self._num_prompt)
        self._meters.preemptions.inc(timings.num_preemptions)
        wait_s = timings.scheduler_wait_s + timings.transit_s + timings.device_wait_s
        self._observe("e2e_request_latency_seconds", self._last_s - self._began_s)
        self._observe("request_queue_time_seconds", wait_s)
        self._observe("request_prefill_time_seconds", timings.prefill_s)
        self._observe("request_decode_time_seconds", timings.decode_s)
        self._observe("request_inference_time_seconds", timings.prefill_s + timings.decode_s)
        self._observe("request_prompt_tokens", self._num_prompt)
        self._observe("request_generation_tokens", self._num_tokens)
        if (tpot_s := self._tpot_s) is not None:
            self._observe("request_time_per_output_token_seconds", tpot_s)
        self._end(reason, "met" if self._in_time() else "missed")

    @property
    def _tpot_s(self) -> float | None:
        gaps = self._num_tokens - 1
        return (self._last_s - self._first_s) / gaps if gaps > 0 else None

    def _in_time(self) -> bool:
        slo = self._slo or {}
        ttft_s, tpot_s = self._first_s - self._began_s, self._tpot_s
        late = 1e3 * ttft_s > slo.get("ttft_ms", float("inf"))
        return not late and 1e3 * (tpot_s or 0.0) <= slo.get("tpot_ms", float("inf"))

    def _end(self, reason: str, result: str | None) -> None:
        if self.ended is None:
            times = self._sent_at_s, time.perf_counter()
            counts = self._num_prompt, self._num_tokens
            self.ended = Ended(reason, *times, *counts, self._timings)
            self._sent.tell()
            self._meters.ends[reason].inc()
            if self._slo and result is not None:
                self._meters.objectives[result].inc()

    def _observe(self, name: str, value: float) -> None:
        self._meters.seconds[name].observe(value)
