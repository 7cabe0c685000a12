"""What is kept for a peer that does not read, and how it is written when it does."""

from array import array

import pytest

from nodeserve.client.connection import MAX_INCOMING_BYTES
from nodeserve.coordinator.request import Request, Stamps
from nodeserve.coordinator.streams import FRAME_BYTES, Backlog, Stream, end_of
from nodeserve.policy.units import Waiting
from nodeserve.types import Timings
from nodeserve.wire.frames import HEADER
from nodeserve.wire.messages import pack_floats, pack_ids
from tests.fakes.transport import FakeTransport

NUM_TOP = 20
BACKLOG_BYTES = 100_000


class RecordingTransport(FakeTransport):
    """Also knows the size of each frame's payload."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def write(self, data: bytes) -> None:
        self.sizes.append(len(data) - HEADER.size)
        super().write(data)


class Peer:
    def __init__(self) -> None:
        self.now_s = 0.0
        self.backlog = Backlog(10 * BACKLOG_BYTES)
        self.transport = RecordingTransport()
        self.stream = Stream(
            self.transport,  # type: ignore[arg-type]
            BACKLOG_BYTES,
            None,
            self.backlog,
            lambda: self.now_s,
        )

    def request(self, number: int, wants_logprobs: bool) -> Request:
        request = Request(
            number,
            number,
            self.stream,
            array("i", [1]),
            1,
            {},
            None,
            1 << 20,
            Waiting(number, 1, 1, 0.0),
            Stamps(0.0, first_token=0.0),
            num_sent=1,
            wants_logprobs=wants_logprobs,
        )
        self.stream.requests[number] = request
        return request

    def token(self, request: Request, num: int = 1) -> None:
        """As the coordinator does it with what a step sampled."""
        request.tokens.extend([7] * num)
        if request.wants_logprobs:
            top = [pack_ids(range(NUM_TOP)), pack_floats([-1.0] * NUM_TOP)]
            request.logprobs += [[-0.5, *top] for _ in range(num)]
        if not request.dirty:
            self.stream.mark(request)


async def test_log_probabilities_count_as_kept_for_a_peer_that_does_not_read() -> None:
    peer = Peer()
    peer.stream.pause()
    request, left_bytes, num = peer.request(1, True), peer.backlog.left_bytes, 0
    while not peer.stream.closed:
        peer.token(request)
        peer.stream.flush()
        num += 1
        assert num * NUM_TOP * 8 < 2 * BACKLOG_BYTES
        assert not request.logprobs, "kept where nobody counts it"
        assert peer.backlog.left_bytes <= left_bytes - num * NUM_TOP * 8
    assert peer.transport.closed
    peer.stream.lost()
    assert peer.backlog.left_bytes == left_bytes


async def test_tokens_alone_are_kept_where_they_are() -> None:
    peer = Peer()
    peer.stream.pause()
    request, left_bytes = peer.request(1, False), peer.backlog.left_bytes
    for _ in range(1000):
        peer.token(request)
        peer.stream.flush()
    assert peer.backlog.left_bytes == left_bytes
    peer.stream.resume()
    assert len(peer.transport.sizes) == 1 and peer.transport.tokens == {1: [7] * 1000}


async def test_what_was_kept_comes_in_order_and_once() -> None:
    peer = Peer()
    plain, rich = peer.request(1, False), peer.request(2, True)
    ending = peer.request(3, True)
    for num in (2, 3):
        for request in (plain, rich, ending):
            peer.token(request, num)
        peer.stream.flush()
        peer.stream.pause()
    peer.token(ending, 4)  # its last step, not flushed yet
    peer.stream.end(ending, end_of(ending, "stop", Timings(), None, ""))
    assert peer.transport.tokens == {1: [7] * 2, 2: [7] * 2, 3: [7] * 2}
    peer.stream.resume()
    assert peer.transport.tokens == {1: [7] * 5, 2: [7] * 5, 3: [7] * 9}
    assert len(peer.transport.ends[3]) == 1 and not rich.dirty and not plain.dirty


async def test_no_frame_is_larger_than_a_client_takes() -> None:
    """The tokens of many long answers, which is more than fits into a frame."""
    peer, num = Peer(), FRAME_BYTES // 16
    peer.stream.pause()
    for number in range(10):
        peer.token(peer.request(number, False), num)
    peer.stream.resume()
    assert sum(peer.transport.sizes) > 2 * FRAME_BYTES
    assert max(peer.transport.sizes) < FRAME_BYTES + 5 * num < MAX_INCOMING_BYTES
    assert peer.transport.tokens == dict.fromkeys(range(10), [7] * num)


@pytest.mark.parametrize("wants_logprobs", [False, True])
async def test_the_wait_for_a_reader_is_the_clients(wants_logprobs: bool) -> None:
    peer = Peer()
    prompt, late = peer.request(1, wants_logprobs), peer.request(2, wants_logprobs)
    peer.token(prompt)
    peer.stream.flush()
    peer.stream.pause()
    peer.token(late)
    peer.stream.flush()
    assert prompt.client_wait_s(3.0) == 0.0 and late.client_wait_s(3.0) == 3.0
    peer.now_s = 4.0
    peer.stream.resume()
    assert prompt.client_wait_s(9.0) == 0.0 and late.client_wait_s(9.0) == 4.0
