"""A leader's records and its followers' answers, over real rings in one process."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pytest

from nodeserve.errors import HandoffFailed, TeamError
from nodeserve.policy.copy_plan import PageGeometry, shards
from nodeserve.wire.channel import CoordinatorEnd, TeamEnd, TeamRings, WorkerEnd
from nodeserve.wire.messages import (
    AttachPages,
    CountExperts,
    DetachPages,
    ExpertsCounted,
    PagesAttached,
    Probe,
)
from nodeserve.wire.team import FROM_FOLLOWER, Choose, Forget, Pull, Step
from nodeserve.wire.team import Landed as CopyLanded
from nodeserve.worker.contract import CopyFailed, ExpertRows, Landed, Moved, Offered, Source, Ticket
from nodeserve.worker.follower import Follower
from nodeserve.worker.link import LeaderLink
from nodeserve.worker.peer_seats import PeerSeats
from nodeserve.worker.team import PART_BYTES, LeaderTeam
from nodeserve.worker.team_transfer import TeamTransfer
from tests.fakes.link import FakeLink
from tests.patience import PATIENCE_S
from tests.unit.test_runner import FakeTransfer

GEOMETRY = PageGeometry(num_layers=4, num_kv_heads=4, block_size=1, head_dim=8, value_bytes=2)


class Pages(FakeTransfer):
    """Also says who was cancelled, and which peers' pages are mapped, by team."""

    def __init__(self) -> None:
        super().__init__()
        self.cancelled: list[int] = []
        self.peers: dict[int, list[int]] = {}

    def attach(self, team: int, sources: Sequence[Source]) -> None:
        self.peers[team] = [one.worker for one in sources]

    def detach(self, team: int) -> list[int]:
        self.peers.pop(team, None)
        return super().detach(team)

    def cancel(self, request_id: int) -> None:
        self.cancelled.append(request_id)


class Steps:
    """What a follower took part in."""

    def __init__(self) -> None:
        self.plans: list[bytes] = []
        self.num_choices = 0
        self.num_sent = 0  # results that went to the leader, and it was not told

    def follow(self, plan: bytes) -> None:
        self.plans.append(plan)

    def num_passed(self) -> int:
        count, self.num_sent = self.num_sent, 0
        return count

    def choose(self) -> None:
        self.num_choices += 1

    def forget_rows(self) -> None:
        self.plans.append(b"forget")


class Member:
    """A follower whose device is the test."""

    def __init__(self, end: TeamEnd) -> None:
        self.link, self.steps, self.pages = FakeLink(), Steps(), Pages()
        seats = PeerSeats(self.pages, shards(GEOMETRY, tp=2)[1], turn=1)
        leader = LeaderLink(end, self.link.beat)
        rows = ExpertRows(b"l", b"e", b"r")
        parts = self.link, leader, self.steps, self.pages, seats
        self.loop = Follower(*parts, expert_rows=lambda: rows, forget_rows=self.steps.forget_rows)

    def turn(self, *moved: Moved) -> None:
        self.pages.moved.extend(moved)
        self.loop.turn()


class Bench:
    """A leader's team and its followers, at both ends of real rings."""

    def __init__(self, owner: ExitStack, num_followers: int = 2) -> None:
        node = f"{os.getpid():x}"
        made = [CoordinatorEnd(node, f"w{i}", 4096) for i in range(num_followers + 1)]
        channels = [owner.enter_context(end) for end in made]
        ends = [owner.enter_context(WorkerEnd(_copied(one.spec))) for one in channels]
        leading: list[TeamEnd] = []
        self.members: list[Member] = []
        for place in range(1, num_followers + 1):
            specs = channels[0].spec, channels[place].spec
            rings = owner.enter_context(TeamRings(node, f"t{place}", *specs))
            for leads, worker in ((True, ends[0]), (False, ends[place])):
                end = owner.enter_context(TeamEnd(_copied(rings.spec), leads, worker))
                if leads:
                    leading.append(end)
                else:
                    self.members.append(Member(end))
        self.inbox = ends[0].inbox
        self.num_beats = 0
        self.team = LeaderTeam(leading, self.inbox.wait, self._beat)
        self.pages = Pages()
        self.transfer = TeamTransfer(self.pages, self.team, offers_at_once=True)

    def _beat(self) -> None:
        self.num_beats += 1
        for member in self.members:
            member.turn()

    def turn(self) -> None:
        for member in self.members:
            member.turn()


def _copied(spec: Any) -> Any:
    """With descriptors of its own, as another process would have."""
    fds = {name: os.dup(getattr(spec, name)) for name in spec.__slots__ if name.endswith("fd")}
    return type(spec)(**{**{name: getattr(spec, name) for name in spec.__slots__}, **fds})


@pytest.fixture
def bench() -> Iterator[Bench]:
    with ExitStack() as owner:
        yield Bench(owner)


def ticket(request_id: int, source: int = 4) -> Ticket:
    return Ticket(request_id, source, b"\0" * 4, b"\1" * 4)


def test_every_follower_takes_part_in_every_step_in_order(bench: Bench) -> None:
    for plan in (b"one", b"two"):
        bench.team.step(lambda plan=plan: plan)  # type: ignore[misc]
    bench.team.choose()
    bench.turn()
    for member in bench.members:
        assert member.steps.plans == [b"one", b"two"] and member.steps.num_choices == 1


def test_a_follower_says_what_its_device_counted(bench: Bench) -> None:
    member = bench.members[0]
    member.link.inbox.append(CountExperts(3))
    member.turn()
    assert member.link.said == [ExpertsCounted(3, b"l", b"e", b"r")]


def test_followers_forget_what_they_counted_while_the_leader_was_warming_up(bench: Bench) -> None:
    bench.team.step(lambda: b"warm-up")
    bench.team.warm()
    bench.team.step(lambda: b"real")
    bench.turn()
    for member in bench.members:
        assert member.steps.plans == [b"warm-up", b"forget", b"real"]


def test_a_plan_larger_than_a_ring_arrives_whole(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = os.urandom(9 * PART_BYTES + 5)
    monkeypatch.setattr("nodeserve.worker.team.WAIT_S", 0.0)
    bench.team.step(lambda: plan)
    bench.turn()
    assert [member.steps.plans for member in bench.members] == [[plan], [plan]]
    assert bench.num_beats > 0, "the ring was full, and the leader gave signs of life"


@pytest.mark.parametrize("record", [Step(2, b""), Step(0, b""), Choose(2)])
def test_a_follower_that_is_out_of_step_ends(bench: Bench, record: Step | Choose) -> None:
    bench.team.post(record)
    with pytest.raises(TeamError, match=f"{record.number}, here 1 was due"):
        bench.turn()


def test_a_leader_hears_how_far_the_last_stage_is(bench: Bench) -> None:
    """Also when results go out long after their step was begun, and nothing new has come."""
    assert [bench.team.step(bytes) for _ in range(3)] == [1, 2, 3]
    told = []
    for num_sent in (0, 2, 1):
        bench.members[1].steps.num_sent = num_sent
        bench.turn()
        told.append([bench.team.has_passed(number) for number in (1, 2, 3)])
    assert told == [[False] * 3, [True, True, False], [True] * 3]


def test_the_smallest_member_says_how_many_blocks_there_are(bench: Bench) -> None:
    for member, num_blocks in zip(bench.members, (70, 50), strict=True):
        member.loop.stopped = True  # it says that it joined, and does not wait
        member.loop.run(num_blocks)
    assert bench.team.least_blocks(60) == 50


def test_an_answer_ends_the_leaders_wait(bench: Bench) -> None:
    """Its inbox is empty; the time only ends a broken test."""
    bench.members[0].steps.num_sent = 1
    bench.members[0].turn()
    assert bench.inbox.wait(PATIENCE_S) is True


def test_a_pull_has_landed_when_it_has_everywhere(bench: Bench) -> None:
    bench.transfer.begin(ticket(7))
    bench.turn()
    assert [member.pages.begun for member in bench.members] == [[ticket(7)]] * 2
    bench.pages.moved.append(Landed(7, 100, 0.25))
    bench.members[0].turn(Landed(7, 100, 0.5))
    assert bench.transfer.poll() == []
    bench.members[1].turn(Landed(7, 100, 0.125))
    assert bench.transfer.poll() == [Landed(7, 300, 0.5)]


def test_the_first_that_fails_fails_it_for_all(bench: Bench) -> None:
    bench.transfer.begin(ticket(7))
    bench.members[0].pages.problem = HandoffFailed("no such pages")
    bench.turn()
    [failed] = bench.transfer.poll()
    assert isinstance(failed, CopyFailed) and "no such pages" in str(failed.problem)
    bench.turn()
    assert bench.pages.cancelled == [7] == bench.members[1].pages.cancelled
    bench.members[1].pages.begun.clear()
    assert bench.transfer.poll() == []


def test_an_answer_to_an_earlier_pull_of_a_request_does_not_count(bench: Bench) -> None:
    """The source was lost and the request came back, while a follower had the old pages."""
    bench.transfer.begin(ticket(7))
    bench.turn()
    bench.members[0].turn(Landed(7, 1, 0.0))
    bench.members[1].turn(Landed(7, 1, 0.0))
    assert bench.transfer.detach(4) == [7]
    bench.transfer.begin(ticket(7, source=6))
    bench.pages.moved.append(Landed(7, 100, 0.0))
    assert bench.transfer.poll() == [], "only the leader has the new pages"
    bench.turn()
    for member in bench.members:
        member.turn(Landed(7, 100, 0.0))
    assert bench.transfer.poll() == [Landed(7, 300, 0.0)]


def test_a_cancelled_pull_is_forgotten_before_the_next_step(bench: Bench) -> None:
    bench.transfer.begin(ticket(7))
    bench.transfer.cancel(7)
    bench.team.step(bytes)
    records = [type(one) for one in bench.members[0].loop._leader.drain()]
    assert records == [Pull, Forget, Step]


def test_pages_that_all_must_copy_first_are_offered_when_all_have(bench: Bench) -> None:
    transfer = TeamTransfer(bench.pages, bench.team, offers_at_once=False)
    assert transfer.offer(7, b"\1\0\0\0") is None
    bench.turn()
    assert transfer.poll() == [Offered(7, b"\1\0\0\0")]
    for member in bench.members:
        member.pages.offers_late = True
    assert transfer.offer(8, b"\2\0\0\0") is None
    bench.turn()
    bench.members[0].turn(Offered(8, b"\2\0\0\0"))
    bench.members[1].turn(Offered(8, b"\3\0\0\0"))
    [failed] = transfer.poll()
    assert isinstance(failed, CopyFailed) and "different pages" in str(failed.problem)


def test_what_followers_copied_out_they_forget_when_it_was_read(bench: Bench) -> None:
    """Or the room for it is gone for ever, where pages leave through the host."""
    transfer = TeamTransfer(bench.pages, bench.team, offers_at_once=True)
    bench.pages.offers_late = True
    assert transfer.offer(7, b"\1\0\0\0") is None
    bench.turn()
    bench.pages.moved.append(Offered(7, b"\1\0\0\0"))
    assert transfer.poll() == [Offered(7, b"\1\0\0\0")]
    transfer.withdraw(7)
    transfer.withdraw(8)
    bench.turn()
    assert [member.pages.cancelled for member in bench.members] == [[7], [7]]


def told(member: Member, leader: int, tp: int, pp: int) -> None:
    """The coordinator tells of a team's pages, the last member's first."""
    for rank in reversed(range(tp * pp)):
        place = [rank % tp, tp, rank // tp, pp]
        member.link.inbox.append(AttachPages(leader + rank, -1, 0, b"", leader, place))


def test_a_member_maps_the_pages_that_hold_parts_of_its_own(bench: Bench) -> None:
    """It has the second half of the heads of all layers."""
    member = bench.members[0]
    told(member, 10, tp=2, pp=1)  # equal
    told(member, 20, tp=1, pp=1)
    told(member, 30, tp=4, pp=2)
    told(member, 40, tp=1, pp=3)
    told(member, 50, tp=8, pp=1)  # every head twice
    member.turn()
    answered = [one.worker for one in member.link.said if isinstance(one, PagesAttached)]
    assert len(answered) == 2 + 1 + 8 + 3 + 8, "also those of which it maps nothing"
    mapped = {team: sorted(workers) for team, workers in member.pages.peers.items()}
    assert mapped == {10: [11], 20: [20], 30: [32, 33, 36, 37], 40: [40, 41, 42], 50: [55, 57]}


def test_a_team_is_mapped_once_all_of_it_that_matters_is_known(bench: Bench) -> None:
    member = bench.members[0]
    told(member, 4, tp=4, pp=1)
    last = member.link.inbox[:2]  # of ranks 3 and 2
    member.link.inbox[:] = [last[0], *member.link.inbox[2:]]
    member.turn()
    assert member.pages.peers == {}
    member.link.inbox.append(last[1])
    member.turn()
    assert sorted(member.pages.peers[4]) == [6, 7]


def test_a_teams_pages_go_with_the_first_of_it_that_ended_and_come_back_with_all(
    bench: Bench,
) -> None:
    member = bench.members[0]
    told(member, 4, tp=1, pp=2)
    member.turn()
    bench.transfer.begin(ticket(7))
    member.turn()
    assert member.pages.begun == [ticket(7)]
    for worker in (5, 4, 9):
        member.link.inbox.append(DetachPages(worker))
    member.turn()
    assert member.pages.begun == [] and member.pages.peers == {}
    told(member, 4, tp=1, pp=2)
    again = member.link.inbox.pop()
    member.turn()
    assert member.pages.peers == {}, "half a team is no team"
    member.link.inbox.append(again)
    member.turn()
    assert sorted(member.pages.peers[4]) == [4, 5]


def test_what_is_for_leaders_ends_a_follower(bench: Bench) -> None:
    bench.members[0].link.inbox.append(Probe())
    with pytest.raises(TeamError, match="Probe is for leaders"):
        bench.turn()


def test_followers_leave_with_their_leader(bench: Bench) -> None:
    bench.team.leave()
    bench.turn()
    assert all(member.loop.stopped for member in bench.members)


class Crowded:
    """The end of a follower that takes nothing before its own words have been heard."""

    def __init__(self) -> None:
        self.inbox = self.outbox = self
        self.said = [FROM_FOLLOWER.encode(CopyLanded(1, 8, 0.5))]
        self.taken: list[bytes] = []
        self.num_refused = 0

    def drain(self, max_records: int = 1) -> list[bytes]:
        said, self.said = self.said, []
        return said

    def put(self, record: bytes, timeout_s: float) -> bool:
        if self.said:
            self.num_refused += 1
            assert self.num_refused < 3, "each waits for the other"
            return False
        self.taken.append(record)
        return True


def test_a_leader_hears_its_followers_while_it_waits_for_room() -> None:
    end = Crowded()
    team = LeaderTeam([end], lambda seconds: None, lambda: None)  # type: ignore[list-item]
    team.choose()
    assert len(end.taken) == 1
    assert team.answers() == [CopyLanded(1, 8, 0.5)], "kept for whoever asks"
