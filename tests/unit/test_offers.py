"""Offers of pages through slots of shared memory, by members of one team."""

from collections.abc import Sequence
from typing import Any, cast

from nodeserve.errors import HandoffFailed
from nodeserve.wire.messages import pack_ids, unpack_ids
from nodeserve.worker.contract import CopyFailed, Landed, Offered
from nodeserve.worker.offers import HostOffers
from nodeserve.worker.page_copies import Blocks

NUM_SLOTS = 8


class Copies:
    """End when they are looked at; that of request `fails` comes to nothing."""

    def __init__(self, fails: int) -> None:
        self._fails = fails
        self._begun: list[int] = []

    def begin(self, request_id: int, *pages: object) -> None:
        self._begun.append(request_id)

    def poll(self) -> list[Landed | CopyFailed]:
        over, self._begun = self._begun, []
        lost = HandoffFailed("the bus")
        return [
            CopyFailed(one, lost) if one == self._fails else Landed(one, 0, 0.0) for one in over
        ]


def member(fails: int = -1) -> HostOffers:
    blocks = Blocks(0, NUM_SLOTS, 64)
    return HostOffers(cast(Any, Copies(fails)), blocks, blocks, blocks.num_bytes)


def slots_of(offers: HostOffers, request_id: int, num_blocks: int) -> Sequence[int]:
    offers.offer(request_id, pack_ids(range(num_blocks)))
    [offered] = offers.poll()
    assert isinstance(offered, Offered)
    return list(unpack_ids(offered.block_ids))


def test_members_choose_the_same_slots_after_one_of_them_has_lost_an_offer() -> None:
    """The others hear of it later, when more was given back."""
    chosen = []
    for offers in (member(fails=1), member()):
        for request_id in (1, 2):
            offers.offer(request_id, pack_ids(range(2)))
        offers.poll()
        offers.withdraw(2)
        offers.withdraw(1)
        chosen.append([slots_of(offers, 3, 5), slots_of(offers, 4, 3)])
    assert chosen[0] == chosen[1] == [[0, 1, 2, 3, 4], [5, 6, 7]]
