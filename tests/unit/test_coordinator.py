"""The coordinator's decisions and promises, with everything interleaved in every order."""

import random
from contextlib import nullcontext

import pytest

from nodeserve.coordinator.request import Request
from nodeserve.coordinator.streams import Backlog, Stream
from nodeserve.errors import ProtocolError, ShuttingDown
from nodeserve.policy.lifecycle import Phase
from nodeserve.types import Role, Timings
from nodeserve.wire.messages import Alive, Goodbye, RequestFailed, Submit, pack_ids
from tests.fakes.node import STEP_S, FakeNode, FakeWorker, expected_stream, policies
from tests.fakes.transport import FakeTransport
from tests.repeats import seeds

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED
LAYOUTS = {"1m": [M], "1p1d": [P, D], "2p1d": [P, P, D], "1p2d": [P, D, D], "1p1d1m": [P, D, M]}


async def test_one_request_is_prefilled_here_and_decoded_there() -> None:
    node, rng = FakeNode([P, D]), random.Random(0)
    stream, client = node.connect()
    node.submit(stream, 7, [3, 1, 4], 5)
    node.run_to_idle(rng)
    assert client.tokens[7] == expected_stream([3, 1, 4], 5)
    (end,) = client.ends[7]
    assert end.reason == "length" and end.code is None
    assert end.usage == {"prompt_tokens": 3, "completion_tokens": 5}
    assert end.timings["prefill_worker"] == 0 and end.timings["decode_worker"] == 1
    assert end.timings["handoff_bytes"] > 0
    timings = Timings(**end.timings)
    stages = [timings.scheduler_wait_s, timings.transit_s, timings.device_wait_s]
    assert all(stage >= 0.0 for stage in [*stages, timings.prefill_s, timings.return_s])
    assert timings.prefill_s == pytest.approx(STEP_S) and timings.transit_s > 0.0
    assert timings.ttft_s + timings.decode_s == pytest.approx(node.now)
    node.check_nothing_held()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", seeds(3, 6))
async def test_random_life_ends_every_request_once(layout: str, seed: int) -> None:
    """Cancels, disconnects, refusals and preemptions anywhere; small pools force the last two."""
    rng = random.Random(seed)
    node = FakeNode(LAYOUTS[layout], num_blocks=20, policies=policies(max_num_seqs=5))
    clients = [node.connect() for _ in range(3)]
    prompts: dict[tuple[int, int], tuple[list[int], int]] = {}
    for request_id in range(40):
        place = rng.randrange(3)
        prompt = [rng.randrange(97) for _ in range(rng.randint(1, 100))]
        prompts[place, request_id] = prompt, rng.randint(1, 60)
        node.submit(clients[place][0], request_id, *prompts[place, request_id])
        for _ in range(rng.randint(0, 60)):
            node.act(rng)
        if rng.random() < 0.2 and (running := list(clients[place][0].requests.values())):
            node.coordinator.abort(rng.choice(running))
    node.coordinator.drop_stream(clients[2][0])
    node.run_to_idle(rng)
    for (place, request_id), (prompt, max_tokens) in prompts.items():
        if place == 2:
            continue
        (end,) = clients[place][1].ends[request_id]
        got = clients[place][1].tokens.get(request_id, [])
        assert got == expected_stream(prompt, max_tokens)[: len(got)]
        if end.reason == "length":
            assert len(got) == max_tokens == end.usage["completion_tokens"]
        else:
            assert (end.reason, end.code) == ("cancelled", "cancelled")
    node.check_nothing_held()


@pytest.mark.parametrize("lost", [0, 1, 2])
@pytest.mark.parametrize("seed", range(5))
async def test_a_lost_worker_costs_no_token(lost: int, seed: int) -> None:
    """Streams go on on the others without a missing or repeated token."""
    rng, node = random.Random(seed), FakeNode([P, D, M], num_blocks=40)
    stream, client = node.connect()
    prompts = [[rng.randrange(97) for _ in range(rng.randint(1, 60))] for _ in range(20)]
    for request_id, prompt in enumerate(prompts):
        node.submit(stream, request_id, prompt, 20)
    for _ in range(rng.randint(50, 900)):
        node.act(rng)
    node.lose(node.workers[lost])
    node.run_to_idle(rng)
    for request_id, prompt in enumerate(prompts):
        assert client.tokens[request_id] == expected_stream(prompt, 20)
        assert [end.reason for end in client.ends[request_id]] == ["length"]
    node.check_nothing_held()


BAD: dict[str, tuple[Submit, str]] = {
    "empty prompt": (Submit(1, b"", {}, None, 0), "invalid_request"),
    "half a token": (Submit(1, b"abc", {}, None, 0), "invalid_request"),
    "token too high": (Submit(1, pack_ids([97]), {}, None, 0), "invalid_request"),
    "token negative": (Submit(1, pack_ids([-1]), {}, None, 0), "invalid_request"),
    "prompt too long": (Submit(1, pack_ids([1] * 256), {}, None, 0), "prompt_too_long"),
    "no tokens wanted": (Submit(1, pack_ids([1]), {"max_tokens": 0}, None, 0), "invalid_request"),
    "nan": (Submit(1, pack_ids([1]), {"temperature": float("nan")}, None, 0), "invalid_request"),
    "unknown field": (Submit(1, pack_ids([1]), {"best_of": 2}, None, 0), "invalid_request"),
    "wrong type": (Submit(1, pack_ids([1]), {"top_p": "0.5"}, None, 0), "invalid_request"),
    "bad slo": (Submit(1, pack_ids([1]), {}, {"ttft_ms": -5}, 0), "invalid_request"),
    "unknown slo": (Submit(1, pack_ids([1]), {}, {"ttft": 5}, 0), "invalid_request"),
}


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_request_ends_at_once_and_disturbs_nobody(name: str) -> None:
    node, rng = FakeNode([M]), random.Random(0)
    stream, client = node.connect()
    message, code = BAD[name]
    node.submit(stream, 2, [5], 3)
    node.coordinator.submit(stream, message)
    (end,) = client.ends[1]
    assert (end.reason, end.code) == ("error", code) and end.message
    node.run_to_idle(rng)
    assert client.tokens[2] == expected_stream([5], 3)
    assert node.coordinator.totals.rejected == 1


async def test_a_request_id_in_use_is_refused() -> None:
    node, rng = FakeNode([M]), random.Random(0)
    stream, client = node.connect()
    node.submit(stream, 1, [5], 3)
    node.submit(stream, 1, [6], 3)
    assert [end.code for end in client.ends.pop(1)] == ["invalid_request"]
    node.run_to_idle(rng)
    assert client.tokens[1] == expected_stream([5], 3)


async def test_past_the_queue_limit_requests_are_refused_and_the_accepted_finish() -> None:
    node, rng = FakeNode([P, D], policies=policies(max_num_queued_reqs=50)), random.Random(0)
    stream, client = node.connect()
    for request_id in range(200):
        node.submit(stream, request_id, [request_id % 97], 3)
    node.run_to_idle(rng)
    codes = [client.ends[request_id][0].code for request_id in range(200)]
    assert all(len(ends) == 1 for ends in client.ends.values())
    assert codes.count("overloaded") == node.coordinator.totals.rejected > 0
    assert codes.count(None) == node.coordinator.totals.finished == 200 - codes.count("overloaded")


async def test_higher_priority_goes_first() -> None:
    node, rng = FakeNode([M], policies=policies(max_num_seqs=1)), random.Random(0)
    stream, client = node.connect()
    order: list[int] = []
    for request_id, priority in enumerate([0, 0, 5, 1]):
        node.turn()
        message = Submit(request_id, pack_ids([1]), {"max_tokens": 2}, None, priority)
        node.coordinator.submit(stream, message)
    while node.coordinator.requests:
        node.act(rng)
        order += [i for i in client.ends if i not in order]
    assert order == [0, 2, 3, 1]


async def test_a_peer_that_does_not_read_stalls_itself_alone() -> None:
    """Its tokens wait in one place, arrive whole when it reads, and Ends keep their order."""
    node, rng = FakeNode([M]), random.Random(0)
    (slow, slow_client), (fast, fast_client) = node.connect(), node.connect()
    slow.pause()
    for request_id in range(4):
        node.submit(slow, request_id, [request_id + 1], 20)
        node.submit(fast, request_id, [request_id + 1], 20)
    node.run_to_idle(rng)
    assert not slow_client.tokens and len(fast_client.ends) == 4
    slow.resume()
    assert slow_client.tokens == fast_client.tokens
    assert all(len(ends) == 1 for ends in slow_client.ends.values())


async def test_a_backlog_over_the_limit_closes_the_connection() -> None:
    node, rng = FakeNode([M]), random.Random(0)
    stream, client = node.connect(max_backlog_bytes=2000)
    stream.pause()
    for request_id in range(30):
        node.submit(stream, request_id, [1], 20)
    node.run_to_idle(rng)
    assert client.closed and stream.closed
    node.check_nothing_held()


def deaf(backlog: Backlog, *ends: int) -> tuple[Stream, FakeTransport]:
    """A peer that does not read, with so many bytes kept for it."""
    transport = FakeTransport()
    stream = Stream(transport, 1000, None, backlog)  # type: ignore[arg-type]
    stream.pause()
    for num_bytes in ends:
        stream.send(Goodbye("", "x" * num_bytes))
    return stream, transport


async def test_many_backlogs_share_what_there_is_for_all() -> None:
    backlog = Backlog(3000)
    (first, _), (second, _) = deaf(backlog, 900), deaf(backlog, 900)
    left_bytes = backlog.left_bytes
    assert not first.closed and not second.closed and left_bytes < 1200
    late, transport = deaf(backlog, 900)
    assert late.closed and transport.closed, "more than is left beside it"
    late.lost()
    assert backlog.left_bytes == left_bytes
    little, _ = deaf(backlog, 300)
    assert not little.closed
    little.lost()
    first.resume()
    second.resume()
    assert backlog.left_bytes == 3000 and not first.closed


async def test_a_stopping_server_refuses_and_ends_what_runs() -> None:
    node, rng = FakeNode([P, D]), random.Random(3)
    stream, client = node.connect()
    for request_id in range(10):
        node.submit(stream, request_id, [request_id], 50)
    for _ in range(100):
        node.act(rng)
    node.coordinator.closes_s = node.now + 30.0
    node.coordinator.end_all(ShuttingDown("bye"))
    node.submit(stream, 99, [1], 1)
    node.run_to_idle(rng)
    (refused,) = client.ends[99]
    assert refused.code == "shutting_down" and refused.retry_after_s == pytest.approx(30.0)
    for request_id in range(10):
        assert [end.code for end in client.ends[request_id]] == ["shutting_down"]
    node.check_nothing_held()


async def test_a_request_that_outlives_two_workers_is_not_given_a_third() -> None:
    node, rng = FakeNode([M, M, M, M]), random.Random(0)
    stream, client = node.connect()
    node.submit(stream, 1, [5], 200)
    for _ in range(3):
        while not (holders := [w for w in node.workers if not w.lost and w.held]):
            node.act(rng)
        node.lose(holders[0])
    node.run_to_idle(rng)
    assert [end.code for end in client.ends[1]] == ["worker_lost"]
    assert sum(worker.lost for worker in node.workers) == 3
    node.check_nothing_held()


def fail_pull(node: FakeNode, decode: FakeWorker, request: Request) -> None:
    """What a worker says that could not copy the pages; it has nothing of the request."""
    decode.out.clear()
    decode.link.channel.records.clear()  # type: ignore[attr-defined]
    decode.held.clear()
    decode.num_received += 1
    decode.out.append(
        RequestFailed(request.request_id, "handoff_failed", "no such pool", decode.load())
    )
    node.deliver(decode)


async def move(node: FakeNode, rng: random.Random) -> Request:
    """A request on its way to its decode worker."""
    (request,) = node.coordinator.requests.values()
    while request.phase is not Phase.MOVING:
        node.act(rng)
    return request


async def test_a_pull_that_fails_after_its_source_died_is_done_again() -> None:
    node, rng = FakeNode([P, P, D]), random.Random(0)
    stream, client = node.connect()
    node.submit(stream, 1, [5], 20)
    request = await move(node, rng)
    node.lose(node.workers[request.source])
    fail_pull(node, node.workers[2], request)
    assert request.phase is Phase.WAITING and request.num_losses == 0
    node.run_to_idle(rng)
    assert client.tokens[1] == expected_stream([5], 20)
    node.check_nothing_held()


async def test_pages_that_never_arrive_are_computed_again_but_not_for_ever() -> None:
    node, rng = FakeNode([P, D]), random.Random(0)
    stream, client = node.connect()
    node.submit(stream, 1, [5], 20)
    for _ in range(3):
        assert not client.ends
        fail_pull(node, node.workers[1], await move(node, rng))
    node.run_to_idle(rng)
    assert [end.code for end in client.ends[1]] == ["handoff_failed"]
    assert client.tokens[1] == expected_stream([5], 20)[:3], "a token for each prefill"
    node.check_nothing_held()


class Chances(random.Random):
    """What is to happen by chance."""

    def __init__(self, *chances: float) -> None:
        super().__init__()
        self._chances = list(chances)

    def random(self) -> float:
        return self._chances.pop(0)


async def test_pages_on_their_way_to_where_peers_can_read_them_are_work() -> None:
    """Then the watchdog finds a copy that never ends; who waits for a peer has nothing to do."""
    node = FakeNode([P, D])
    stream, _ = node.connect()
    node.submit(stream, 1, [5], 20)
    node.turn()
    worker = node.workers[0]
    worker.receive(Chances())
    node.step(worker, Chances(0.9, 0.1))
    node.deliver(worker)
    assert worker.held[1].state == "copying" and worker.link.busy
    node.step(worker, Chances(0.9))
    node.deliver(worker)
    assert worker.held[1].state == "pinned" and not worker.link.busy
    node.run_to_idle(random.Random(0))
    node.check_nothing_held()


async def test_a_worker_that_counts_more_than_it_was_sent_is_refused() -> None:
    node = FakeNode([M])
    stream, _ = node.connect()
    node.submit(stream, 1, [5], 20)
    node.turn()
    load = node.workers[0].load()
    for num_received, refused in ((1, False), (2, True)):
        with pytest.raises(ProtocolError, match="received") if refused else nullcontext():
            node.coordinator.handle(node.workers[0].link, Alive([*load[:-1], num_received]))
        assert node.workers[0].link.account.load.num_received == 1


async def test_cancelled_requests_leave_the_queue() -> None:
    node = FakeNode([M])
    stream, _ = node.connect()
    for request_id in range(3000):
        node.submit(stream, request_id, [5], 200)
        if request_id >= 100:
            node.coordinator.abort(stream.requests[request_id])
    assert len(node.coordinator.dispatch.dispatcher) == 100


class TickingNode(FakeNode):
    """Its clock goes on whenever anybody reads it, and turns are dated ahead as timers' are."""

    @property
    def now(self) -> float:
        self._now += 1e-5
        return self._now

    @now.setter
    def now(self, now_s: float) -> None:
        self._now = now_s

    def turn(self) -> None:
        self.wake_s = self.coordinator.turn(self.now + 5e-4)


async def test_no_stage_is_negative_and_one_token_takes_no_decoding() -> None:
    node, rng = TickingNode([P, D]), random.Random(0)
    stream, client = node.connect()
    node.submit(stream, 7, [3, 1, 4], 1)
    node.turn()
    node.workers[0].receive(rng)
    node.run_to_idle(rng)
    (end,) = client.ends[7]
    timings = Timings(**end.timings)
    assert timings.decode_s == 0.0 and timings.scheduler_wait_s >= 5e-4
    stages = [timings.transit_s, timings.device_wait_s, timings.prefill_s, timings.return_s]
    assert all(stage >= 0.0 for stage in stages)
