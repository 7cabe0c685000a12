"""What a gateway counts of an answer, and that it counts each once."""

import pytest
from prometheus_client import Histogram
from prometheus_client.parser import text_string_to_metric_families

from nodeserve.client import Chunk
from nodeserve.gateway.meters import BUCKETS_S, LABELS, Meters, Reading
from nodeserve.types import Timings

LONG, NONE = 60_000.0, 1e-9  # ms: what any answer meets, what none does


def samples(meters: Meters) -> dict[str, float]:
    """Those that are not zero, by name and what is special in its labels."""
    found = {}
    for family in text_string_to_metric_families(meters.text().decode()):
        for sample in family.samples:
            if sample.value and "le" not in sample.labels:
                more = [value for label, value in sample.labels.items() if label not in LABELS]
                found["/".join([sample.name, *more])] = sample.value
    return found


def reading(meters: Meters, slo: dict[str, float] | None = None) -> Reading:
    return Reading(meters.of("m"), 0.0, 5, slo)


@pytest.mark.parametrize(
    ("slo", "result"),
    [
        ({"ttft_ms": NONE}, "missed"),
        ({"ttft_ms": 1e12, "tpot_ms": NONE}, "missed"),
        ({"ttft_ms": 1e12, "tpot_ms": LONG}, "met"),
        ({"tpot_ms": LONG}, "met"),
    ],
)
def test_answers_are_held_to_their_slo(slo: dict[str, float], result: str) -> None:
    meters = Meters()
    one = reading(meters, slo)
    one.chunk(Chunk(token_ids=[1]))
    one.chunk(Chunk(token_ids=[2, 3]))
    one.chunk(Chunk(finish_reason="stop", timings=Timings(num_preemptions=2, prefill_s=0.5)))
    one.left()  # the response is over: nothing new
    found = samples(meters)
    assert found[f"nodeserve_slo_requests_total/{result}"] == 1
    assert sum("nodeserve_slo" in name for name in found) == 1
    assert found["vllm:request_success_total/stop"] == 1
    assert found["vllm:generation_tokens_total"] == 3
    assert found["vllm:prompt_tokens_total"] == 5
    assert found["vllm:num_preemptions_total"] == 2
    assert found["vllm:request_prefill_time_seconds_sum"] == 0.5
    for name in ("inter_token_latency", "time_per_output_token"):
        assert found[f"vllm:{name}_seconds_count"] == 1


@pytest.mark.parametrize(("tokens", "result"), [([], "refused"), ([7], "missed")])
def test_failures_miss_and_refusals_are_told_apart(tokens: list[int], result: str) -> None:
    meters = Meters()
    one = reading(meters, {"ttft_ms": LONG})
    one.chunk(Chunk(token_ids=tokens))
    one.failed()
    one.left()
    found = samples(meters)
    assert found[f"nodeserve_slo_requests_total/{result}"] == 1
    assert found["vllm:request_success_total/error"] == 1
    assert "vllm:request_success_total/abort" not in found


def test_gaps_are_counted_as_the_histogram_would() -> None:
    meters, known = Meters(), Histogram("known", "", buckets=BUCKETS_S, registry=None)
    gaps_s = [0.0, *BUCKETS_S, *(1.5 * bound for bound in BUCKETS_S), 1e4, 0.02, 0.02]
    sent = meters.of("m").sent
    for number, gap_s in enumerate(gaps_s):
        known.observe(gap_s)
        sent.gap(gap_s, number / 10)  # some are told meanwhile
        sent.tokens(2)
    found = {
        (sample.name, sample.labels.get("le")): sample.value
        for family in text_string_to_metric_families(meters.text().decode())
        for sample in family.samples
    }
    name = "vllm:inter_token_latency_seconds"
    (family,) = known.collect()
    for sample in family.samples:
        if sample.name.endswith(("_bucket", "_sum", "_count")):
            ours = found[sample.name.replace("known", name), sample.labels.get("le")]
            assert ours == pytest.approx(sample.value), sample
    assert found["vllm:generation_tokens_total", None] == 2 * len(gaps_s)


def test_who_leaves_misses_nothing() -> None:
    meters = Meters()
    one = reading(meters, {"ttft_ms": NONE})
    one.left()
    found = samples(meters)
    assert found == {"vllm:request_success_total/abort": 1.0}
