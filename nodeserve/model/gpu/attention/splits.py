"""Where the splits of a decode meet: how many there may be, and room for what each has found.

A long context is cut into splits so that few sequences fill the device. Each leaves its sums, and
whoever comes last at a sequence merges them.
"""

from dataclasses import dataclass

import torch
import triton

WAVES = 4  # splits of a long step, in fillings of the device: an uneven end costs less than one
MERGED_VALUES = 4096  # that a program holds while it merges splits


@dataclass(frozen=True, slots=True)
class Room:
    """Launches that run at the same time must not share it."""

    num_seqs: int
    partials: torch.Tensor  # float32 [items, blocks of heads, rows of a block, width]
    stats: torch.Tensor  # float32 [items, blocks of heads, rows of a block, 2]
    arrivals: torch.Tensor  # int32 [num_seqs, blocks of heads], zero between launches


class Splits:
    """Of one kernel, whose programs take `block_n` keys at a time for `rows` heads of one of
    `num_blocks` blocks of heads, with sums of `width` numbers; `wave` programs of each block fill
    the device."""

    def __init__(
        self, wave: int, block_n: int, num_blocks: int, rows: int, width: int, device: torch.device
    ) -> None:
        self.wave = max(wave, 1)
        self._block_n = block_n
        self._shape = num_blocks, rows
        self._width = width
        self._device = device
        self._rooms: list[Room] = []  # all of them: captured graphs know their addresses

    def max_items(self, num_seqs: int, max_context_len: int) -> int:
        """Splits that the kernel may make of such a step, per block of heads.

        Splits are at least total / (wave * WAVES) tiles long, so all but one per sequence are
        fewer than wave * WAVES; and no split is shorter than a tile.
        """
        tiles = max(triton.cdiv(max_context_len, self._block_n), 1)
        return int(min(self.wave * WAVES + num_seqs, num_seqs * tiles))

    def room(self, num_seqs: int) -> Room:
        """For steps of so many sequences; what was made once stays."""
        if not self._rooms or self._rooms[-1].num_seqs < num_seqs:
            self._rooms.append(self._made(num_seqs))
        return self._rooms[-1]

    def _made(self, num_seqs: int) -> Room:
        shape = (self.wave * WAVES + num_seqs, *self._shape)
        return Room(
            num_seqs,
            torch.empty(*shape, self._width, dtype=torch.float32, device=self._device),
            torch.empty(*shape, 2, dtype=torch.float32, device=self._device),
            torch.zeros(num_seqs, self._shape[0], dtype=torch.int32, device=self._device),
        )
