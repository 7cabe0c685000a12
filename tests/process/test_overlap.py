"""Worker processes whose device computes beside the step loop: what comes out is the same."""

import os
import random
import signal
from functools import partial
from typing import Any

import pytest

from nodeserve.wire.messages import (
    Abort,
    Cancel,
    Dropped,
    Failed,
    KvPulled,
    PagesAttached,
    RequestFailed,
    Shutdown,
    StepDone,
)
from tests.fakes.harness import default_spec, hand_over, started
from tests.fakes.model import FakeSettings, expected_stream
from tests.fakes.raw_client import RawClient
from tests.patience import PATIENCE_S
from tests.process.conftest import Connect, Nodes
from tests.process.test_node import settled

pytestmark = pytest.mark.slow

VOCAB = 97
PROMPT = [7 * i % 91 + 1 for i in range(70)]
STEP_S = 0.002
QUICK = FakeSettings(overlaps=True, step_s=STEP_S).name
IDLE_LOAD = [0, 0, 0, 64, 0]


def until_idle(worker: Any) -> None:
    worker.until(lambda: worker.load[:5] == IDLE_LOAD)


@pytest.mark.parametrize("step_s", [0.0, STEP_S])
def test_a_worker_streams_preempts_and_ends_cleanly(step_s: float) -> None:
    """Three requests of 11 blocks in a pool of 24: the youngest gives way, then comes back."""
    model = FakeSettings(overlaps=True, step_s=step_s).name
    with started(default_spec(kv_memory=24 * 128, model=model)) as [worker]:
        for request_id in (1, 2, 3):
            worker.prefill(request_id, PROMPT, max_tokens=100)
        worker.until(lambda: bool(worker.preempted))
        assert worker.preempted == [3]
        before = worker.streams.pop(3)
        worker.finish(1, 2)
        worker.prefill(3, [*PROMPT, *before], max_tokens=100 - len(before))
        worker.finish(3)
        expected = expected_stream(PROMPT, 100)
        assert worker.streams[1] == worker.streams[2] == expected
        assert before + worker.streams[3] == expected
        worker.send(Shutdown())
        assert worker.process.wait(PATIENCE_S) == 0


def test_a_stop_token_ends_a_stream_and_its_extra_token_is_not_told() -> None:
    """The harness fails on a token after the end."""
    stream = expected_stream(PROMPT, 40)
    with started(default_spec(model=QUICK)) as [worker]:
        for request_id in range(1, 7):
            stop = stream[6 * request_id]
            worker.prefill(request_id, PROMPT, max_tokens=40, stop_token_ids=(stop,))
        worker.prefill(7, PROMPT, max_tokens=60)
        worker.finish(*range(1, 8))
        for request_id in range(1, 7):
            end = stream.index(stream[6 * request_id]) + 1
            assert worker.streams[request_id] == stream[:end]
            assert worker.finished[request_id] == 1
        assert worker.streams[7] == expected_stream(PROMPT, 60)
        until_idle(worker)


def test_a_newcomer_is_pulled_beside_running_steps() -> None:
    specs = default_spec(model=QUICK), default_spec(index=1, model=QUICK)
    with started(*specs) as [source, target]:
        target.attach(source)
        target.expect(PagesAttached)
        target.prefill(9, PROMPT, max_tokens=150)
        target.until(lambda: len(target.streams.get(9, [])) > 3)
        for request_id in range(1, 6):
            hand_over(source, target, request_id, PROMPT[: 13 * request_id], max_tokens=40)
        target.finish(*range(1, 6), 9)
        for request_id in range(1, 6):
            stream = source.streams[request_id] + target.streams[request_id]
            assert stream == expected_stream(PROMPT[: 13 * request_id], 40)
        assert target.streams[9] == expected_stream(PROMPT, 150)
        until_idle(target)
        source.until(lambda: source.load[:5] == IDLE_LOAD)


def test_messages_are_answered_in_the_middle_of_a_step() -> None:
    """The step is longer than the test may take."""
    model = FakeSettings(overlaps=True, step_s=2 * PATIENCE_S).name
    slow = default_spec(index=1, model=model)
    with started(default_spec(model=QUICK), slow) as [source, target]:
        target.attach(source)
        source.prefill(1, PROMPT, handoff=True, max_tokens=9)
        source.until(lambda: 1 in source.pinned)
        target.prefill(2, PROMPT, max_tokens=9)
        target.prefill(3, [1] * 256, max_tokens=3)
        assert target.expect(RequestFailed, 3).code == "prompt_too_long"
        target.pull(source, 1, PROMPT, max_tokens=9)
        assert target.expect(KvPulled, 1).num_bytes
        target.send(Cancel(2))
        dropped = target.expect(Dropped, 2)
        assert dropped.load[:4] == [1, 0, 0, 64 - 2 * 5], "the step still writes its five blocks"
        assert dropped.load[4] == 32, "and computes its tokens"
        assert not any(isinstance(message, StepDone) for message in target.said)


@pytest.mark.parametrize("at_step", [0, 1, 7])
def test_a_failure_of_a_launch_is_said_before_the_exit(at_step: int) -> None:
    model = FakeSettings(overlaps=True, fail_at_step=at_step).name
    with started(default_spec(model=model)) as [worker]:
        worker.prefill(1, PROMPT, max_tokens=30)
        assert "told to fail" in worker.expect(Failed).message
        assert worker.process.wait(PATIENCE_S) == 1


def cut(stream: list[int], stops: tuple[int, ...]) -> list[int]:
    ends = [place for place, token in enumerate(stream, 1) if token in stops]
    return stream[: ends[0]] if ends else stream


def has_begun(client: RawClient, i: int) -> bool:
    """With up to six tokens, or it has ended already."""
    return i in client.ends or len(client.tokens.get(i, [])) > i % 7


@pytest.mark.parametrize("layout", ["1m", "1p1d", "2p2d"])
async def test_a_node_streams_through_stops_cancels_and_preemptions(
    nodes: Nodes, connect: Connect, layout: str
) -> None:
    fake = {"overlaps": True, "step_s": 0.001, "vocab_size": VOCAB, "max_blocks": 48}
    node = nodes.start(layout=layout, fake=fake)
    client = await connect(node)
    rng = random.Random(layout)
    expected: dict[int, list[int]] = {}
    for i in range(60):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 90))]
        stops = tuple(rng.sample(range(VOCAB), rng.choice([0, 1, 3])))
        max_tokens = rng.randint(1, 120)
        penalty = rng.choice([0.0, 0.0, 0.0, 0.5])  # the fake model ignores it
        client.submit(
            i, prompt, max_tokens=max_tokens, stop_token_ids=stops, presence_penalty=penalty
        )
        expected[i] = cut(expected_stream(prompt, max_tokens, VOCAB), stops)
    aborted = set(range(0, 60, 6))
    for i in aborted:
        await client.read_until(partial(has_begun, client, i))
        client.send(Abort(i))
    await client.finish(*range(60))
    for i, stream in expected.items():
        [end] = client.ends[i]
        if end.reason == "cancelled":
            assert i in aborted
            assert client.tokens.get(i, []) == stream[: len(client.tokens.get(i, []))]
        else:
            assert client.tokens[i] == stream
    await settled(client)


@pytest.mark.parametrize("victim", [0, 1, 2, 3])
async def test_a_killed_worker_costs_no_token(nodes: Nodes, connect: Connect, victim: int) -> None:
    node = nodes.start(layout="2p2d", fake={"overlaps": True, "step_s": STEP_S})
    client = await connect(node)
    for i in range(12):
        client.submit(i, [i, 2 * i], max_tokens=150)
    await client.read_until(lambda: len(client.tokens) == 12)
    pids = {w["index"]: w["pid"] for w in (await client.stats())["workers"]}
    os.kill(pids[victim], signal.SIGKILL)
    await client.finish(*range(12))
    for i in range(12):
        assert client.tokens[i] == expected_stream([i, 2 * i], 150)
        assert [end.reason for end in client.ends[i]] == ["length"]
