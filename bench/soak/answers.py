"""What simulated workers must answer: every stream is known in advance, token for token."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from nodeserve.types import Sampling
from nodeserve.worker.executor_sim import Tokens

NEAR = range(-4, 5)  # a token that may not be is skipped, so seeds near each other look alike


@dataclass(slots=True)
class Answer:
    """Checks one stream as it comes. A sampled request without a seed gets one that nobody is told:
    then all tokens have to agree on it."""

    prompt: Sequence[int]
    sampling: Sampling
    tokens: Tokens
    vocab_size: int
    num_tokens: int = 0
    _last: int = field(init=False)
    _seeds: list[int] | None = field(init=False)  # those that are possible still; None: any

    def __post_init__(self) -> None:
        self._last = self.prompt[-1]
        seed = 0 if self.sampling.greedy else self.sampling.seed
        self._seeds = None if seed is None else [seed]

    @property
    def is_over(self) -> bool:
        """Nothing may come after the tokens so far."""
        stopped = self.num_tokens > 0 and self._last in self.sampling.stop_token_ids
        return stopped or self.num_tokens >= self.sampling.max_tokens

    def add(self, token_ids: Sequence[int]) -> str:
        """What is wrong with the next tokens; nothing if they are right."""
        for token_id in token_ids:
            if self.is_over:
                return f"token {token_id} after the last of {self.num_tokens}"
            position = len(self.prompt) + self.num_tokens - 1
            last, after = self._last, self.tokens.after
            if self._seeds is None:
                ahead = token_id - after(last, position)
                self._seeds = [(ahead + near) % self.vocab_size for near in NEAR]
            self._seeds = [one for one in self._seeds if after(last, position, one) == token_id]
            if not self._seeds:
                return f"token {token_id} at place {self.num_tokens} is wrong, lost or doubled"
            self._last, self.num_tokens = token_id, self.num_tokens + 1
        return ""

    def end(self, reason: str) -> str:
        """What is wrong with an answer that ended well for this reason."""
        if not self.is_over:
            return f"ended ({reason}) after {self.num_tokens} of {self.sampling.max_tokens} tokens"
        right = "stop" if self._last in self.sampling.stop_token_ids else "length"
        return "" if reason == right else f"ended with {reason}, not {right}"


def whole(prompt: Sequence[int], sampling: Sampling, tokens: Tokens) -> list[int]:
    """All that a request with a known seed gets."""
    seed = 0 if sampling.greedy else sampling.seed or 0
    stream, given = list(prompt), 0
    while given < sampling.max_tokens:
        stream.append(tokens.after(stream[-1], len(stream) - 1, seed))
        given += 1
        if stream[-1] in sampling.stop_token_ids:
            break
    return stream[len(prompt) :]
