"""Parts of a simulated device: tokens made up, copies that take their time, noise."""

import fcntl
import mmap
import os
import resource
import statistics
import threading
from array import array
from collections.abc import Iterator
from math import exp

import pytest

from nodeserve.errors import ConfigError, HandoffFailed
from nodeserve.policy.batching import Batch, Sequence, Work
from nodeserve.policy.copy_plan import CopyRun
from nodeserve.policy.cost import RankWork
from nodeserve.policy.profile import pass_factor
from nodeserve.policy.profiles import PROFILES, profile_named
from nodeserve.types import Sampling
from nodeserve.wire.messages import pack_ids, unpack_floats, unpack_ids
from nodeserve.worker.alarm import Alarm
from nodeserve.worker.contract import Landed, Source, Ticket
from nodeserve.worker.executor_sim import SimExecutor, Tokens
from nodeserve.worker.pages import make_pool
from nodeserve.worker.transfer_sim import SimTransfer
from tests.fakes.pages import whole_blocks
from tests.patience import PATIENCE_S

PAGE, TRUE_BYTES = 8, 1000


def stream(tokens: Tokens, prompt: list[int], num_tokens: int) -> list[int]:
    known = list(prompt)
    while len(known) < len(prompt) + num_tokens:
        known.append(tokens.after(known[-1], len(known) - 1))
    return known[len(prompt) :]


def test_tokens_follow_from_the_last_one_and_its_place_alone() -> None:
    tokens = Tokens(97, ())
    whole = stream(tokens, [5, 6, 7], 50)
    assert stream(tokens, [9, 9, 7], 50) == whole, "what is further back does not matter"
    assert stream(tokens, [5, 6, 7, *whole[:20]], 30) == whole[20:], "nor where it was continued"
    assert stream(tokens, [5, 7], 50) != whole != stream(tokens, [5, 6, 8], 50)
    assert len(set(whole)) > 10


@pytest.mark.parametrize("vocab_size", [4, 97, 128_256])
def test_tokens_are_of_the_vocabulary_and_never_end_a_request(vocab_size: int) -> None:
    eos = (0, 2)
    tokens = Tokens(vocab_size, eos)
    seen = {tokens.after(token, place) for token in range(vocab_size) for place in (0, 1, 77)}
    assert seen <= set(range(vocab_size)) - set(eos)


@pytest.mark.parametrize("num_top", [0, 1, 20])
def test_logprobs_are_a_distribution_led_by_the_chosen_token(num_top: int) -> None:
    row, logprob, top_ids, top_logprobs = Tokens(7, ()).logprobs(3, 6, num_top)
    ids, values = unpack_ids(top_ids).tolist(), list(unpack_floats(top_logprobs))
    assert row == 3 and len(ids) == len(values) == min(num_top, 7) == len(set(ids))
    assert sum(map(exp, values)) <= 1.0 and values == sorted(values, reverse=True)
    assert all(0 <= token_id < 7 for token_id in ids)
    if num_top:
        assert ids[0] == 6 and values[0] == pytest.approx(logprob)


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Link:
    """A device with 8 blocks whose link carries a block a second, and a peer's 8 blocks, each full
    of its number."""

    def __init__(self, source_fd: int, bell_fd: int) -> None:
        source = make_pool(source_fd, 8 * PAGE)
        for block in range(8):
            source[block * PAGE : (block + 1) * PAGE] = bytes([block]) * PAGE
        self.pool = mmap.mmap(-1, 8 * PAGE)
        self.clock = Clock()
        alarm = Alarm(bell_fd, self.clock)  # not started: the test looks by itself
        self.transfer = SimTransfer(self.pool, PAGE, TRUE_BYTES, TRUE_BYTES, alarm, self.clock)
        self.transfer.attach(3, whole_blocks(3, source_fd, 8 * PAGE, PAGE))

    def begin(self, request_id: int, *blocks: int) -> None:
        ids = pack_ids(blocks)
        self.transfer.begin(Ticket(request_id, 3, ids, ids))

    def landed_at(self, now_s: float) -> list[tuple[int, int, float]]:
        self.clock.now_s = now_s
        landed = self.transfer.poll()
        assert all(isinstance(one, Landed) for one in landed)
        return [tuple(one) for one in landed]  # type: ignore[misc]


@pytest.fixture
def link() -> Iterator[Link]:
    source_fd, bell_fd = os.memfd_create("source"), os.eventfd(0)
    yield Link(source_fd, bell_fd)
    os.close(source_fd)
    os.close(bell_fd)


def test_copies_land_one_after_the_other_in_their_time(link: Link) -> None:
    link.begin(1, 1, 2)
    link.begin(2, 3)
    assert not link.transfer.busy, "the alarm tells: nobody has to ask again and again"
    assert link.landed_at(101.9) == [] and link.pool[1 * PAGE] == 0
    assert link.landed_at(102.0) == [(1, 2 * TRUE_BYTES, 2.0)]
    assert [link.pool[block * PAGE] for block in range(4)] == [0, 1, 2, 0]
    assert link.landed_at(103.0) == [(2, TRUE_BYTES, 1.0)] and link.pool[3 * PAGE] == 3
    link.clock.now_s = 110.0
    link.begin(3, 4)
    assert link.landed_at(110.9) == [] and link.landed_at(111.0) == [(3, TRUE_BYTES, 1.0)]


def test_a_team_of_few_sends_no_faster_than_its_links(link: Link) -> None:
    """Its worker has twice our part of a block, and sends the other half to our neighbour."""
    other_fd = os.memfd_create("other")
    make_pool(other_fd, 8 * 2 * PAGE)
    half = (CopyRun(0, 0, PAGE),)
    link.transfer.attach(4, (Source(4, other_fd, 8 * 2 * PAGE, b"", 2 * PAGE, half),))
    os.close(other_fd)
    link.transfer.begin(Ticket(1, 4, pack_ids([1]), pack_ids([1])))
    assert link.landed_at(101.9) == [] and link.landed_at(102.0) == [(1, TRUE_BYTES, 2.0)]


def test_a_cancelled_copy_writes_nothing_and_the_next_one_lands(link: Link) -> None:
    link.begin(1, 1)
    link.begin(2, 2)
    link.transfer.cancel(1)
    link.transfer.cancel(99)
    assert link.landed_at(102.0) == [(2, TRUE_BYTES, 1.0)] and link.pool[PAGE] == 0
    link.begin(1, 1)  # the same request, again
    assert link.landed_at(103.0) == [(1, TRUE_BYTES, 1.0)]


def test_copies_from_a_peer_that_ended_are_over_and_no_others(link: Link) -> None:
    other_fd = os.memfd_create("other")
    make_pool(other_fd, 8 * PAGE)[2 * PAGE] = 77
    link.transfer.attach(4, whole_blocks(4, other_fd, 8 * PAGE, PAGE))
    os.close(other_fd)
    link.begin(1, 1)
    link.transfer.begin(Ticket(2, 4, pack_ids([2]), pack_ids([2])))
    link.begin(3, 3)
    assert link.transfer.detach(3) == [1, 3] and link.transfer.detach(3) == []
    assert link.landed_at(110.0) == [(2, TRUE_BYTES, 1.0)]
    assert [link.pool[block * PAGE] for block in range(4)] == [0, 0, 77, 0]
    with pytest.raises(HandoffFailed, match="not attached"):
        link.begin(4, 1)


def test_a_wrong_ticket_is_refused_and_takes_no_time(link: Link) -> None:
    with pytest.raises(HandoffFailed):
        link.begin(1, 8)
    link.begin(2, 1)
    assert link.landed_at(101.0) == [(2, TRUE_BYTES, 1.0)]


def test_noise_is_the_same_for_the_same_pass_and_has_the_deviation_asked_for() -> None:
    factors = [pass_factor(0.1, 5, 2, number) for number in range(2000)]
    assert factors == [pass_factor(0.1, 5, 2, number) for number in range(2000)]
    assert statistics.mean(factors) == pytest.approx(1.0, abs=0.01)
    assert statistics.stdev(factors) == pytest.approx(0.1, abs=0.01)
    assert factors[:20] != [pass_factor(0.1, 6, 2, number) for number in range(20)]
    assert factors[:20] != [pass_factor(0.1, 5, 3, number) for number in range(20)]
    assert pass_factor(0.0, 5, 2, 1) == 1.0
    assert min(pass_factor(3.0, 1, 1, number) for number in range(100)) > 0.0


def test_an_unknown_profile_names_those_there_are() -> None:
    with pytest.raises(ConfigError) as caught:
        profile_named("h1000")
    assert all(name in str(caught.value) for name in PROFILES)


class Alone:
    """A lockstep that notes what enters."""

    def __init__(self) -> None:
        self.entered: list[RankWork] = []

    def enter(self, work: RankWork) -> int:
        self.entered.append(work)
        return len(self.entered)

    def over(self, number: int) -> None:
        return None


def test_only_the_last_chunk_of_a_prompt_gives_a_token() -> None:
    tokens, alone = Tokens(97, ()), Alone()
    executor = SimExecutor(alone, Alarm(-1), tokens)  # type: ignore[arg-type]
    prompt = Sequence(1, array("i", range(10)), 10, Sampling(logprobs=2))
    first = executor.launch(Batch([Work(prompt, 0, 6, False)], 0, 6)).result()
    last = executor.launch(Batch([Work(prompt, 6, 4, True)], 0, 4)).result()
    assert first.token_ids == [] and first.logprobs is None
    assert last.token_ids == [tokens.after(9, 9)] and last.logprobs is not None
    assert [work.prefill_tokens for work in alone.entered] == [6, 4]


def test_an_alarm_hears_a_bell_whatever_its_number() -> None:
    """Those of a large node are above what `select` takes; the thread died and nothing said so."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limits[1] <= 2048:
        pytest.skip("no more than 2048 open files are allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], 2048), limits[1]))
    low_fd = os.eventfd(0, os.EFD_NONBLOCK)
    high_fd = fcntl.fcntl(low_fd, fcntl.F_DUPFD_CLOEXEC, 1024)
    os.close(low_fd)
    woke = threading.Event()
    try:
        alarm = Alarm(high_fd, clock=lambda: 1.0)
        alarm.start(lambda: None, woke.set)
        alarm.wake_at(1.0)
        assert woke.wait(PATIENCE_S)
    finally:
        os.close(high_fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
