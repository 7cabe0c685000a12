"""What a prefill unit computes next, as far as the outside can know: its prompts, in order.

The account says how many prompt tokens are outstanding; workers prefill first come, first served,
so the difference to what was sent says how far into which prompt they are. That gives the work of
the running pass and of the next one, and from it when they end.
"""

from collections import deque

from nodeserve.policy.cost import RankWork


class PrefillQueue:
    """Prompts sent to one unit and not computed yet."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self._prompts: deque[list[int]] = deque()  # [tokens left, tokens computed]

    def send(self, num_tokens: int) -> None:
        self._prompts.append([num_tokens, 0])
        self.num_tokens += num_tokens

    def sync(self, outstanding_tokens: int) -> None:
        """Only so many are left; amortised O(1) per prompt."""
        gone = self.num_tokens - outstanding_tokens
        self.num_tokens = outstanding_tokens
        if gone < 0:  # the worker has more than we sent: of an earlier life, at the end of its line
            self._prompts.append([-gone, 0])
        while gone > 0:
            prompt = self._prompts[0]
            step = min(gone, prompt[0])
            prompt[0] -= step
            prompt[1] += step
            gone -= step
            if not prompt[0]:
                self._prompts.popleft()

    def work(self, budget: int) -> RankWork:
        """Of a pass with room for `budget` tokens."""
        tokens, attention = 0, 0.0
        for left, done in self._prompts:
            if tokens >= budget:
                break
            count = min(left, budget - tokens)
            tokens += count
            attention += count * (done + count / 2)
        return RankWork(tokens, attention)
