"""Real workers with a real model that end in the middle of answers: the very same tokens come.

A node is asked for the same answers in peace, once, and with each fault: greedy ones, seeded ones,
with penalties and constraints that depend on every token before, and with log probabilities.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.fakes.raw_client import RawClient
from tests.process.conftest import Nodes, RunningNode
from tests.process.test_lost_workers import all_ready
from tests.reference.embedded import needs_embedded_model

pytestmark = needs_embedded_model

NUM_TOKENS = 24
KV_MEMORY = 100_000_000  # holds all cases; more would take time at every start
LONG_LIST = '{"type":"array","items":{"enum":["one","two",{"three":3}]},"minItems":200}'
ASKED: list[dict[str, Any]] = [
    {},
    {"logprobs": 2},
    {"temperature": 0.8, "seed": 11},
    {"temperature": 1.2, "seed": 12, "top_p": 0.9, "top_k": 50, "logprobs": 1},
    {"temperature": 0.7, "seed": 13, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
    {"repetition_penalty": 1.2, "presence_penalty": 0.4, "min_tokens": NUM_TOKENS},
    {"constraint": {"regex": "[a-z ]{2000}"}, "ignore_eos": False},
    {"constraint": {"json_schema": LONG_LIST}, "ignore_eos": False, "temperature": 1.0, "seed": 14},
]
PROMPTS = [
    [(31 * case + 7 * place) % 40_000 + 100 for place in range(90)] for case in range(len(ASKED))
]
Answers = tuple[list[list[int]], list[Any]]


@dataclass(frozen=True, slots=True)
class Calm:
    """A node, and its answers while nothing happened to it."""

    nodes: Nodes
    node: RunningNode
    answers: Answers


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calm]:
    yield from started(tmp_path_factory, "1p1d")


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calm]:
    yield from started(tmp_path_factory, "2m")


def started(factory: pytest.TempPathFactory, layout: str) -> Iterator[Calm]:
    nodes = Nodes(factory.mktemp(layout))
    try:
        forever = {"restart_delay": 0.0, "max_restarts": 100}
        node = nodes.start(layout=layout, real=True, kv_memory=KV_MEMORY, **forever)
        yield Calm(nodes, node, asyncio.run(in_peace(node)))
    finally:
        nodes.end()


async def in_peace(node: RunningNode) -> Answers:
    client = await RawClient.connect(node.socket)
    try:
        return await answers(client)
    finally:
        await client.close()


async def answers(client: RawClient) -> Answers:
    """Tokens and log probabilities of every case, computed together."""
    for case, sampling in enumerate(ASKED):
        client.submit(case, PROMPTS[case], max_tokens=NUM_TOKENS, **sampling)
    await client.finish(*range(len(ASKED)))
    assert {end.reason for ends in client.ends.values() for end in ends} == {"length"}
    tokens = [client.tokens[case] for case in range(len(ASKED))]
    assert [len(one) for one in tokens] == [NUM_TOKENS] * len(ASKED)
    return tokens, [client.logprobs.get(case) for case in range(len(ASKED))]


async def compare(calm: Calm, fault: str, worker: int, phase: str) -> None:
    client = await RawClient.connect(calm.node.socket)
    try:
        before = (await all_ready(client))["workers"][worker]["restarts"]
        order = calm.nodes.order(fault, worker, phase)
        assert await answers(client) == calm.answers
        assert not order.exists(), "it has happened"
        assert (await all_ready(client, 1))["workers"][worker]["restarts"] == before + 1
    finally:
        await client.close()


@pytest.mark.parametrize(
    ("fault", "worker", "phase"),
    [  # every pair of fault and phase: tests/process/test_fault_matrix.py
        ("kill", 0, "prefill"),
        ("kill", 0, "handoff"),
        ("kill", 1, "decode"),
        ("exception", 0, "handoff"),
    ],
)
async def test_a_pair(pair: Calm, fault: str, worker: int, phase: str) -> None:
    await compare(pair, fault, worker, phase)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
async def test_two_that_do_both(twins: Calm, phase: str) -> None:
    await compare(twins, "kill", 1, phase)
