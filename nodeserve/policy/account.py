"""What is known of one worker: its last report, and what was sent after the requests it counts.

Rings keep their order, so the two together are exact, whatever was lost or reordered in between: no
request is tracked, a report that never came is made good by the next one.
"""

from collections import deque

from nodeserve.types import Load


class Account:
    """One worker's tokens, blocks and sequences; every number follows from the two above."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.load = Load(0, 0, 0, num_blocks, 0, 0)
        self.outstanding_tokens = 0  # of prompts, sent and not computed in a step that ended
        self.free_blocks = num_blocks  # nobody waits for these; negative: promised too many
        self.num_sequences = 0
        self.refused = False  # a pull was refused and nothing has changed since
        self._sent: deque[tuple[int, int]] = deque()  # tokens, blocks: not in the report yet
        self._num_sent = 0  # since the start

    @property
    def num_sent(self) -> int:
        """Prompts and pulls, since the start."""
        return self._num_sent

    def send(self, num_tokens: int, num_blocks: int) -> None:
        """A prompt of `num_tokens` went into the worker's ring, or a pull (no tokens)."""
        self._sent.append((num_tokens, num_blocks))
        self._num_sent += 1
        self.outstanding_tokens += num_tokens
        self.free_blocks -= num_blocks
        self.num_sequences += 1

    def report(self, load: Load) -> None:
        """The worker said what it holds. O(requests that it has received since the last one)."""
        while self._num_sent - len(self._sent) < load.num_received:
            self._sent.popleft()
        self.load = load
        self.refused = False
        self.outstanding_tokens = load.waiting_tokens
        self.free_blocks = load.num_free_blocks
        self.num_sequences = load.num_running + load.num_waiting + load.num_pinned
        for num_tokens, num_blocks in self._sent:
            self.outstanding_tokens += num_tokens
            self.free_blocks -= num_blocks
            self.num_sequences += 1
