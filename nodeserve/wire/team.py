"""What a leader and its followers say to each other, over rings of their own.

A plan is the executor's own form of a step, made and read by the two ends of one device. What does
not fit into one record goes ahead in Parts. Everything else is about pages: block ids are the same
on all workers of a team, each of which holds its own part of every block.
"""

from typing import NamedTuple

from nodeserve.wire import limits
from nodeserve.wire.tagged import Tagged

# ---- leader -> follower


class Part(NamedTuple):
    """The next bytes of the plan that a Step ends."""

    data: bytes


class Step(NamedTuple):
    """Take part in step `number`, which is one more than the last one's."""

    number: int
    data: bytes


class Choose(NamedTuple):
    """Take part in the choice of this step's tokens, the oldest whose tokens are not chosen. Only
    where steps of several stages are under way at once; else it belongs to Step."""

    number: int


class Warm(NamedTuple):
    """All steps so far were for warming up: forget what was counted in them."""


class Pull(NamedTuple):
    """Copy your part of another team's blocks. Answer: Landed or CopyFailed with this `number`."""

    number: int
    request_id: int
    source: int  # the leader of the team that has them
    source_ids: bytes
    target_ids: bytes


class Offer(NamedTuple):
    """Let peers read these blocks. Answer: Offered or CopyFailed with this `number`."""

    number: int
    request_id: int
    block_ids: bytes


class Forget(NamedTuple):
    """Neither copy for this request nor let peers read pages of it any more. No answer, nor one to
    its Pull or Offer if none was sent before."""

    request_id: int


class Leave(NamedTuple):
    """The leader leaves, and so do you."""


ToFollower = Part | Step | Choose | Warm | Pull | Offer | Forget | Leave
TO_FOLLOWER: Tagged[ToFollower] = Tagged(ToFollower, limits.OF_A_RING)

# ---- follower -> leader


class Joined(NamedTuple):
    """First record: the weights are here, steps can come."""

    num_blocks: int  # that it has room for


class Passed(NamedTuple):
    """The results of step `number` are on their way to the leader."""

    number: int


class Landed(NamedTuple):
    """Answer to Pull."""

    number: int
    num_bytes: int
    seconds: float


class Offered(NamedTuple):
    """Answer to Offer: peers must use these ids."""

    number: int
    block_ids: bytes


class CopyFailed(NamedTuple):
    """Answer to Pull or Offer: it came to nothing."""

    number: int
    code: str
    message: str


AboutPages = Landed | Offered | CopyFailed
FromFollower = Joined | Passed | Landed | Offered | CopyFailed
FROM_FOLLOWER: Tagged[FromFollower] = Tagged(FromFollower, limits.OF_A_RING)
