"""What the workers of one instance share in one life: nameless, inherited as descriptors.

A bell for each worker and the board of those that run their passes together, memory in which they
meet to set up their collectives, and for each follower the rings to its leader and back.
"""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import NamedTuple

from nodeserve.wire.channel import TEAM_RING_BYTES, ChannelSpec, TeamRings


class LockstepFds(NamedTuple):
    """The board: memory of size 0, which the first of them sizes; and a bell for each."""

    board: int
    bells: tuple[int, ...]

    @property
    def inherited(self) -> tuple[int, ...]:
        return (self.board, *self.bells)

    def close(self) -> None:
        for fd in self.inherited:
            os.close(fd)


def make_memory(name: str) -> int:
    """A descriptor of memory of size 0, for nobody else."""
    fd = os.memfd_create(name)
    os.fchmod(fd, 0o600)
    return fd


def make_lockstep(num_ranks: int) -> LockstepFds:
    """To be closed when every rank has inherited them."""
    with contextlib.ExitStack() as opened:
        board = make_memory("nodeserve-lockstep")
        opened.callback(os.close, board)
        bells: list[int] = []
        for _ in range(num_ranks):
            bells.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
            opened.callback(os.close, bells[-1])
        opened.pop_all()
    return LockstepFds(board, tuple(bells))


class Shared:
    """Of one instance, whose workers have these `channels`, in the order of their ranks; each
    `team_size` of them are a team, and the first of those its leader. `ring_bytes`: of the rings
    of a team, each way."""

    def __init__(
        self,
        node_id: str,
        label: str,
        channels: Sequence[ChannelSpec],
        team_size: int,
        ring_bytes: int = TEAM_RING_BYTES,
    ) -> None:
        self._team_size = team_size
        self._rings: dict[int, TeamRings] = {}  # by the follower's rank
        with contextlib.ExitStack() as opened:
            self.lockstep = make_lockstep(len(channels))
            opened.callback(self.lockstep.close)
            self.rendezvous = make_memory("nodeserve-rendezvous")
            opened.callback(os.close, self.rendezvous)
            for rank, channel in enumerate(channels):
                leader = rank - rank % team_size
                if rank != leader:
                    ends = channels[leader], channel
                    rings = TeamRings(node_id, f"{label}.{rank}", *ends, ring_bytes)
                    self._rings[rank] = opened.enter_context(rings)
            self._opened = opened.pop_all()

    def team_of(self, rank: int) -> tuple[dict[str, int | str], ...]:
        """What a leader opens the rings to its followers with, a follower those to its leader."""
        return tuple(asdict(rings.spec) for rings in self._rings_of(rank))

    def inherited_by(self, rank: int) -> tuple[int, ...]:
        team = [fd for rings in self._rings_of(rank) for fd in rings.inherited_fds]
        return (*self.lockstep.inherited, self.rendezvous, *team)

    def _rings_of(self, rank: int) -> list[TeamRings]:
        if rank % self._team_size:
            return [self._rings[rank]]
        return [self._rings[one] for one in range(rank + 1, rank + self._team_size)]

    def close(self) -> None:
        """Every worker has inherited its part, or its life is over."""
        self._opened.close()
