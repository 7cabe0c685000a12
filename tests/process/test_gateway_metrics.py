"""/metrics of gateways in front of a real node: the names, and that the numbers are the load's."""

import asyncio
import os
import signal

import httpx2
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.fakes.gateway_process import Gateways
from tests.patience import PATIENCE_S
from tests.process.conftest import StartGateways

pytestmark = pytest.mark.slow

LABELS = {"model_name": "fake", "engine": "0"}
NUM_REQUESTS, NUM_TOKENS = 12, 6
OF_GATEWAYS = {  # what dashboards made for vLLM ask for
    *("prompt_tokens", "generation_tokens", "request_success", "num_preemptions"),
    *("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"),
    *("time_per_output_token_seconds", "request_time_per_output_token_seconds"),
    *("request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds"),
    *("request_inference_time_seconds", "request_prompt_tokens", "request_generation_tokens"),
}
OF_THE_NODE = {
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"),
    *("gpu_cache_usage_perc", "cache_config_info"),
}
Families = dict[str, Metric]


async def scrape(client: httpx2.AsyncClient) -> Families:
    response = await client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = list(text_string_to_metric_families(response.text))
    assert len({family.name for family in families}) == len(families), "each has one heading"
    return {family.name: family for family in families}


def value(families: Families, family: str, suffix: str = "", **labels: str) -> float:
    """Of the one sample with these labels."""
    (found,) = (
        sample.value
        for sample in families[family].samples
        if sample.name == family + suffix and labels.items() <= sample.labels.items()
    )
    return found


async def ask(gateways: Gateways, headers: dict[str, str] | None = None, **body: object) -> int:
    """On a connection of its own."""
    asked = {"prompt": [5, 6, 7], "max_tokens": NUM_TOKENS, "ignore_eos": True, **body}
    async with httpx2.AsyncClient(
        base_url=gateways.url, timeout=PATIENCE_S, verify=False
    ) as client:
        response = await client.post("/v1/completions", json=asked, headers=headers)
        return response.status_code


def check_load(families: Families, requests: int) -> None:
    """The counters of answers are those of `requests` alike ones."""
    tokens = requests * NUM_TOKENS
    assert value(families, "vllm:prompt_tokens", "_total", **LABELS) == 3 * requests
    assert value(families, "vllm:generation_tokens", "_total", **LABELS) == tokens
    ends = {"finished_reason": "length", **LABELS}
    assert value(families, "vllm:request_success", "_total", **ends) == requests
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds"):
        assert value(families, f"vllm:{name}", "_count", **LABELS) == requests
        assert value(families, f"vllm:{name}", "_sum", **LABELS) > 0.0
    gaps = value(families, "vllm:inter_token_latency_seconds", "_count", **LABELS)
    assert 0 < gaps <= requests * (NUM_TOKENS - 1), "tokens may come together"
    sizes = families["vllm:request_generation_tokens"].samples
    assert {s.labels["le"]: s.value for s in sizes if "le" in s.labels}["5.0"] == 0.0
    assert value(families, "vllm:request_generation_tokens", "_sum", **LABELS) == tokens


async def test_counters_are_what_a_load_did(start_gateways: StartGateways) -> None:
    gateways = start_gateways()
    async with httpx2.AsyncClient(
        base_url=gateways.url, timeout=PATIENCE_S, verify=False
    ) as client:
        before = await scrape(client)
        assert {f"vllm:{name}" for name in OF_THE_NODE} <= set(before)
        statuses = await asyncio.gather(
            *(ask(gateways, stream=number % 2 == 0) for number in range(NUM_REQUESTS))
        )
        assert set(statuses) == {200}
        hopeless = {"x-slo-ttft-ms": "0.001"}
        assert await ask(gateways, hopeless) == 429, "its passes are known now"
        for _ in range(2):  # a scrape changes nothing
            families = await scrape(client)
            check_load(families, NUM_REQUESTS)
        assert {f"vllm:{name}" for name in OF_GATEWAYS | OF_THE_NODE} <= set(families)

        assert await ask(gateways, temperature=-1) == 400
        assert await ask(gateways, {"x-slo-ttft-ms": "60000", "x-slo-tpot-ms": "60000"}) == 200
        families = await scrape(client)
        while value(families, "vllm:kv_cache_usage_perc", **LABELS):  # until the workers said so
            families = await scrape(client)
    check_load(families, NUM_REQUESTS + 1)
    for result in ("met", "refused"):
        assert value(families, "nodeserve_slo_requests", "_total", result=result) == 1
    errors = {"finished_reason": "error", **LABELS}
    assert value(families, "vllm:request_success", "_total", **errors) == 1
    for status, count in (("200", NUM_REQUESTS + 1), ("400", 1), ("429", 1)):
        labels = {"route": "/v1/completions", "status": status}
        assert value(families, "nodeserve_http_responses", "_total", **labels) == count
    assert value(families, "nodeserve_gateway_open_requests") == 0

    check_node(families)


def check_node(families: Families) -> None:
    """What the server counted of all of it: one met its SLO, one was refused for it."""
    assert value(families, "nodeserve_up") == 1
    ended = "nodeserve_ended_requests"
    assert value(families, ended, "_total", outcome="finished") == NUM_REQUESTS + 1
    assert value(families, ended, "_total", outcome="rejected") == 1
    assert value(families, "nodeserve_slo_offered_requests", "_total") == 2
    assert value(families, "nodeserve_slo_good_requests", "_total") == 1
    assert value(families, "nodeserve_slo_missed_requests", "_total", blame="refused") == 1
    assert sum(sample.value for sample in families["nodeserve_slo_missed_requests"].samples) == 1
    assert value(families, "nodeserve_slo_attainment", span="300s") == 0.5
    assert value(families, "nodeserve_prefill_pass_tokens", "_total") == 3 * (NUM_REQUESTS + 1)
    prompts = families["nodeserve_worker_prompt_tokens"].samples
    assert sum(sample.value for sample in prompts) == 3 * (NUM_REQUESTS + 1)
    sampled = families["nodeserve_worker_tokens"].samples
    assert sum(sample.value for sample in sampled) == NUM_TOKENS * (NUM_REQUESTS + 1)
    decode = {"worker": "1", "role": "decode"}
    assert value(families, "nodeserve_worker_handoffs", "_total", **decode) == NUM_REQUESTS + 1
    config = families["vllm:cache_config_info"].samples[0].labels
    assert config["block_size"] == "16" and int(config["num_gpu_blocks"]) > 0


async def test_a_client_that_left_is_an_abort(start_gateways: StartGateways) -> None:
    gateways = start_gateways()
    async with httpx2.AsyncClient(
        base_url=gateways.url, timeout=PATIENCE_S, verify=False
    ) as client:
        body = {"prompt": [5], "max_tokens": 1000, "ignore_eos": True, "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as response:
            parts = response.aiter_bytes()
            await anext(parts)
            open_now = value(await scrape(client), "nodeserve_gateway_open_requests")
        families = await scrape(client)
        while value(families, "nodeserve_gateway_open_requests"):  # until it has seen that
            families = await scrape(client)
    aborted = {"finished_reason": "abort", **LABELS}
    assert open_now == value(families, "vllm:request_success", "_total", **aborted) == 1
    assert value(families, "vllm:prompt_tokens", "_total", **LABELS) == 0


async def test_processes_count_together_and_lose_nothing(start_gateways: StartGateways) -> None:
    gateways = start_gateways("--workers", "2")
    assert {await ask(gateways) for _ in range(NUM_REQUESTS)} == {200}
    for _ in range(4):  # whichever answers
        async with httpx2.AsyncClient(base_url=gateways.url, timeout=PATIENCE_S) as client:
            check_load(await scrape(client), NUM_REQUESTS)
    victim = gateways.pids()[0]
    os.kill(victim, signal.SIGKILL)
    gateways.until_log(f"(pid {victim}) was ended by signal 9")
    assert {await ask(gateways) for _ in range(NUM_REQUESTS)} == {200}
    for _ in range(4):
        async with httpx2.AsyncClient(base_url=gateways.url, timeout=PATIENCE_S) as client:
            check_load(await scrape(client), 2 * NUM_REQUESTS)


async def test_without_a_server_a_gateway_still_tells_of_itself(
    start_gateways: StartGateways,
) -> None:
    gateways = start_gateways("--socket", "/tmp/nodeserve-no-such-socket")
    async with httpx2.AsyncClient(base_url=gateways.url, timeout=PATIENCE_S) as client:
        assert await ask(gateways) == 503
        families = await scrape(client)
    assert value(families, "nodeserve_up") == 0
    assert value(families, "nodeserve_http_responses", "_total", status="503") == 1
