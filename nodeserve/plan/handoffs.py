"""From prefill to decode in a simulation: parked requests, pulls over a link, releases.

The steps and messages are those of the live coordinator and worker; a pull takes the pages' bytes
over the lower of both sides' rates, one after the other on the puller's link.
"""

from collections.abc import Callable, Sequence

from nodeserve.plan.clock import Clock
from nodeserve.plan.instances import Instance, Rank
from nodeserve.plan.lives import Life
from nodeserve.policy.blocks import blocks_for
from nodeserve.policy.decode_allocation import DecodeAllocator
from nodeserve.policy.lifecycle import Event
from nodeserve.policy.parked import ParkedQueue
from nodeserve.policy.units import Unit
from nodeserve.types import Load


class Handoffs:
    """Owns the parked requests. `touched` is told of instances that may have work, `changed` of
    news for the dispatcher, `put_back` of requests whose pages are gone."""

    def __init__(
        self,
        clock: Clock,
        instances: Sequence[Instance],
        allocator: DecodeAllocator,
        block_size: int,
        transit_s: float,
    ) -> None:
        self.touched: Callable[[Instance], None] = lambda instance: None
        self.changed: Callable[[], None] = lambda: None
        self.put_back: Callable[[Life], None] = lambda life: None
        self.allocator = allocator
        self.parked: dict[int, Life] = {}
        self._line = ParkedQueue()  # of the same
        self._clock = clock
        self._instances = instances
        self._ranks = [rank for instance in instances for rank in instance.ranks]
        self._block_size = block_size
        self._transit_s = transit_s
        self._news = False  # since the last round

    def park(self, life: Life) -> None:
        """Its pages are ready at `life.source`."""
        life.parked_s = self._clock.now_s
        life.parked_blocks = blocks_for(life.num_tokens + 1, self._block_size)
        self.parked[life.request_id] = life
        self._line.push(life.ready(self._block_size), life.arrival.priority)
        self._news = True

    def finish(self, life: Life) -> None:
        """It ended by itself: how much it grew is what others may be expected to."""
        self.allocator.forget(life.request_id, life.grown_blocks(self._block_size))

    def room_changed(self) -> None:
        """A decoding rank reported."""
        self._news = True

    def decoders(self) -> list[Unit]:
        """The units that may decode."""
        return [
            rank.unit
            for instance in self._instances
            if instance.decodes and not instance.lost
            for rank in instance.ranks
        ]

    def place(self) -> None:
        """Start pulls of what finds room, highest priority first, then the earliest."""
        if not self._news or not self.parked:
            return
        self._news = False
        for request_id, unit in self._line.place(self.allocator, self.decoders()):
            self._pull(self.parked.pop(request_id), self._ranks[unit])

    def lose(self, instance: Instance) -> None:
        """An instance that prefilled or decoded is gone: so are the pages that it held."""
        for life in list(self.parked.values()):
            if self._instances[self._ranks[life.source].unit.instance] is instance:
                del self.parked[life.request_id]
                self._line.remove(life.request_id)
                life.on(Event.WORKER_LOST)
                self.put_back(life)
        self._news = True

    def again(self, life: Life) -> None:
        """A pull did not happen: the pages still wait at their source, if that lives."""
        self.allocator.forget(life.request_id)
        life.on(Event.KV_REFUSED)
        life.holder = life.source
        if self._instance_of(self._ranks[life.source]).lost:
            life.on(Event.WORKER_LOST)
            self.put_back(life)
        else:
            self.park(life)

    def _instance_of(self, rank: Rank) -> Instance:
        return self._instances[rank.unit.instance]

    def _pull(self, life: Life, rank: Rank) -> None:
        life.handoff_wait_s += self._clock.now_s - life.parked_s
        life.holder = rank.unit.index
        life.on(Event.PULLING)
        self._clock.after(self._transit_s, self._pull_arrives, (life, rank))

    def _pull_arrives(self, told: tuple[Life, Rank]) -> None:
        life, rank = told
        now_s = self._clock.now_s
        if not self._instance_of(rank).alive:
            return
        if not rank.begin_pull(life.tokens(now_s, handoff=False)):
            self._clock.after(self._transit_s, self._refused, (life, rank, rank.load()))
            return
        num_blocks = blocks_for(life.num_tokens - 1, self._block_size)
        ends = [self._instance_of(one).profile for one in (rank, self._ranks[life.source])]
        num_bytes = num_blocks * self._block_size * ends[0].kv_bytes_per_token
        seconds = num_bytes / min(end.handoff_bytes_per_s for end in ends)
        landed_s = rank.link_for(now_s, seconds)
        self._clock.at(landed_s, self._landed, (life, rank, num_bytes, seconds))

    def _landed(self, told: tuple[Life, Rank, int, float]) -> None:
        life, rank, _, _ = told
        if self._instance_of(rank).alive:
            rank.scheduler.finish_pull(life.request_id)
            self.touched(self._instance_of(rank))
            self._clock.after(self._transit_s, self._pulled, told)

    def _refused(self, told: tuple[Life, Rank, Load]) -> None:
        life, rank, load = told
        if not self._instance_of(rank).lost:
            rank.unit.account.report(load)
            rank.unit.account.refused = True
            self.again(life)
            self.changed()

    def _pulled(self, told: tuple[Life, Rank, int, float]) -> None:
        life, rank, num_bytes, seconds = told
        if self._instance_of(rank).lost:
            return
        life.on(Event.KV_PULLED)
        life.decode_worker = rank.unit.index
        life.handoff_s += seconds
        life.handoff_bytes += num_bytes
        self._clock.after(
            self._transit_s, self._release, (life.request_id, self._ranks[life.source])
        )
        life.source = -1

    def _release(self, told: tuple[int, Rank]) -> None:
        request_id, rank = told
        instance = self._instance_of(rank)
        if instance.alive:
            rank.scheduler.release(request_id)
            self.touched(instance)
            self._clock.after(self._transit_s, self._dropped, (rank, rank.load()))

    def _dropped(self, told: tuple[Rank, Load]) -> None:
        rank, load = told
        if not self._instance_of(rank).lost:
            rank.unit.account.report(load)
            self.changed()
