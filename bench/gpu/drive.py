"""Steps launched straight into an executor: no scheduler, so that any state can be set up at once.

A decode step at a context of 8k needs no prefill of 8k: sequences are given blocks, and whatever
numbers lie in those pages are attended to.
"""

import time
from array import array
from collections import deque
from dataclasses import dataclass

from nodeserve.policy.batching import Batch, Sequence, Work
from nodeserve.policy.blocks import blocks_for
from nodeserve.types import Sampling
from nodeserve.worker.contract import Executor, Flight

MAX_AHEAD = 2  # steps on their way, as in the step loop


@dataclass(frozen=True, slots=True)
class Room:
    """Blocks that may be used."""

    num_blocks: int
    block_size: int

    def holds(self, num_seqs: int, num_tokens: int) -> bool:
        return num_seqs * blocks_for(num_tokens, self.block_size) <= self.num_blocks


def sequences(room: Room, count: int, context: int, num_tokens: int) -> list[Sequence]:
    """`count` sequences of `context` known tokens with room for `num_tokens`, no block shared.

    Neighbouring blocks of a sequence lie far apart, as they do after hours of serving.
    """
    each = blocks_for(num_tokens, room.block_size)
    assert count * each <= room.num_blocks, "asked for more than there is: see Room.holds"
    made = []
    for index in range(count):
        tokens = array("i", (7 + (index + place) % 97 for place in range(context)))
        sequence = Sequence(index, tokens, context, Sampling(temperature=0.0, ignore_eos=True))
        sequence.block_ids.extend(range(index, count * each, count))
        made.append(sequence)
    return made


def decode_s(
    executor: Executor, room: Room, count: int, context: int, num_steps: int, warm: int = 4
) -> float:
    """Seconds of a decode step, the mean of `num_steps` launched one behind the other."""
    batch = sequences(room, count, context, context + warm + num_steps)
    flights: deque[Flight] = deque()
    began_s = 0.0
    for step in range(warm + num_steps):
        feed = executor.overlaps and step > 0
        work = [
            Work(sequence, context - 1 + step, 1, True, place if feed else None)
            for place, sequence in enumerate(batch)
        ]
        flights.append(executor.launch(Batch(work, num_decodes=count)))
        if len(flights) == (MAX_AHEAD if executor.overlaps else 1):
            land(flights, batch)
        if step + 1 == warm:
            while flights:
                land(flights, batch)
            began_s = time.perf_counter()
    while flights:
        land(flights, batch)
    return (time.perf_counter() - began_s) / num_steps


def land(flights: "deque[Flight]", batch: list[Sequence]) -> None:
    """Wait for the oldest step and book its tokens."""
    tokens = flights.popleft().result().token_ids
    for sequence, token_id in zip(batch, tokens, strict=True):
        sequence.token_ids.append(token_id)


def prefill_s(executor: Executor, room: Room, num_tokens: int, repeats: int) -> list[float]:
    """Seconds of each prefill of a whole prompt, from its launch to its token on the host."""
    times = []
    for _ in range(repeats):
        [sequence] = sequences(room, 1, num_tokens, num_tokens)
        batch = Batch([Work(sequence, 0, num_tokens, True)], num_prefill_tokens=num_tokens)
        began_s = time.perf_counter()
        executor.launch(batch).result()
        times.append(time.perf_counter() - began_s)
    return times
