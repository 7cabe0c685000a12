"""What a pass costs: the one formula that predictions, simulated GPUs and the simulator share.

    pass = fix + max over ranks(own) + expert_token * (tokens of all ranks) / ranks
    own  = token * prefill_tokens + attention * sum(n * (context + n / 2))
           + decode_seq * decodes + kv_token * (their context tokens)

`fix` is what a pass takes however little is in it (weights read, launches, the latency of
collectives); it differs with and without prefill. The ranks of an expert-parallel instance wait for
the slowest at every layer, hence the maximum; the experts' own work is spread over all of them.
The prefill terms follow the cost model of the staggered batch scheduling study, the decode terms
are those of DistServe's fits (time = a + b * context tokens + c * sequences). Those fits change at
a batch size, where other kernels take over: `large` holds from there on. Where few tokens leave a
pass waiting for its weights, arithmetic costs nothing until it takes longer than that: `floor` is
what a pass takes at least, whatever the formula says.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nodeserve.policy.batching import Batch, Work


class RankWork(NamedTuple):
    """What one rank does in one pass."""

    prefill_tokens: int = 0
    attention: float = 0.0  # sum over prefill chunks of n * (context + n / 2): pairs of tokens
    num_decodes: int = 0
    kv_tokens: int = 0  # context tokens that the decodes read


IDLE = RankWork()


def rank_work(batch: Batch) -> RankWork:
    """The work of a planned batch. O(sequences)."""
    decodes, chunks = batch.work[: batch.num_decodes], batch.work[batch.num_decodes :]
    return RankWork(
        batch.num_prefill_tokens,
        prefill_pairs(chunks),
        batch.num_decodes,
        sum(decode.start + 1 for decode in decodes),
    )


def prefill_pairs(chunks: Sequence[Work]) -> float:
    """Pairs of tokens that attention looks at in these chunks of prompts."""
    return sum((chunk.num_tokens * (chunk.start + chunk.num_tokens / 2) for chunk in chunks), 0.0)


@dataclass(frozen=True, slots=True)
class StepCost:
    """Coefficients of the formula above, in seconds."""

    prefill_fix_s: float
    decode_fix_s: float
    token_s: float
    attention_s: float
    decode_seq_s: float
    kv_token_s: float
    expert_token_s: float = 0.0
    large: "StepCost | None" = None  # instead of this, once a rank decodes `large_seqs` or more
    large_seqs: int = 0
    floor: "StepCost | None" = None

    def times(self, factor: float) -> "StepCost":
        """Of passes that take so many times as long."""
        return StepCost(
            self.prefill_fix_s * factor,
            self.decode_fix_s * factor,
            self.token_s * factor,
            self.attention_s * factor,
            self.decode_seq_s * factor,
            self.kv_token_s * factor,
            self.expert_token_s * factor,
            self.large and self.large.times(factor),
            self.large_seqs,
            self.floor and self.floor.times(factor),
        )

    def own_s(self, work: RankWork) -> float:
        """What a rank adds to its pass if it is the slowest."""
        return (
            self.token_s * work.prefill_tokens
            + self.attention_s * work.attention
            + self.decode_seq_s * work.num_decodes
            + self.kv_token_s * work.kv_tokens
        )

    def pass_s(self, ranks: Sequence[RankWork]) -> float:
        """Duration of one pass of an instance; `ranks` has one entry for each of its ranks."""
        if len(ranks) == 1:
            return self._alone_s(ranks[0])
        if self.large and max(work.num_decodes for work in ranks) >= self.large_seqs:
            return self.large.pass_s(ranks)
        prefills = any(work.prefill_tokens for work in ranks)
        tokens = sum(work.prefill_tokens + work.num_decodes for work in ranks)
        pass_s = (
            (self.prefill_fix_s if prefills else self.decode_fix_s)
            + max(map(self.own_s, ranks))
            + self.expert_token_s * tokens / len(ranks)
        )
        return max(pass_s, self.floor.pass_s(ranks)) if self.floor else pass_s

    def _alone_s(self, work: RankWork) -> float:
        """The same of one rank, where simulations spend their time."""
        if self.large and work.num_decodes >= self.large_seqs:
            return self.large._alone_s(work)
        tokens, _, num_decodes, _ = work
        pass_s = (
            (self.prefill_fix_s if tokens else self.decode_fix_s)
            + self.own_s(work)
            + self.expert_token_s * (tokens + num_decodes)
        )
        return max(pass_s, self.floor._alone_s(work)) if self.floor else pass_s
