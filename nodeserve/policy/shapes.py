"""What a shape costs, by arithmetic: from what one worker alone takes to a team or ranks of them.

For shapes that nobody measured. With n tokens in a pass of L layers, each n * h bytes of
activations, links of B bytes a second and a latency of `hop` between two workers:

    tpN  products, attention and the weights' reading: an N-th; K and V heads that are fewer than N
         are read whole by each. Two all-reduces a layer, each by recursive halving and doubling:
         2 log2(N) hop + 2 (N-1)/N n h / (REDUCED B); in shared memory, where each worker writes its
         rows and reads all (csrc/group/meeting.h), (N+1)/3 of what two need
    ppN  a pass through all stages takes as long as one worker's, and N hops: N-1 times the tokens
         to the next stage, once the rows of those that get a token back to the first. It holds each
         stage for an N-th of that (pipeline.py says what passes behind each other do).
    epN  of a sparse layer's experts each rank reads an N-th, and their products are spread over all
         ranks; a pass takes the slowest rank (cost.py). Two all-to-alls a layer, in which a token's
         row goes to each of its k experts and back: hop + (N-1)/N k n h / B.

All-reduce: R. Thakur, R. Rabenseifner, W. Gropp, "Optimization of Collective Communication
Operations in MPICH", 2005, section 4.5. What reading the weights takes is known from what reading
keys and values takes; of a pass's fixed part that is divided, the rest (launches) is everybody's.
"""

import math
from dataclasses import dataclass, replace

from nodeserve.layout import Shape
from nodeserve.policy.cost import StepCost
from nodeserve.policy.sizes import Anatomy

# Of a copy's rate in an all-reduce, which also adds. This and HOP_S of sizes.py are set to the
# tables of tp2, 4 and 8 in kernel_fits.py; tests/unit/test_shapes.py says how far they are off.
REDUCED = 0.75


@dataclass(frozen=True, slots=True)
class Alone:
    """One worker with the whole model: what it takes, what it holds."""

    anatomy: Anatomy
    cost: StepCost
    num_kv_tokens: int
    kv_bytes_per_token: int
    link_bytes_per_s: float

    def num_tokens_in(self, shape: Shape) -> int:
        """That a rank of this shape holds, by its fullest worker; 0 or less: not even the weights
        fit."""
        anatomy = self.anatomy
        room = float(self.num_kv_tokens * self.kv_bytes_per_token)
        if not anatomy.fixed_pool:
            room += anatomy.worker_weight_bytes(Shape()) - anatomy.worker_weight_bytes(shape)
        return int(room / self.worker_kv_bytes(shape))

    def worker_kv_bytes(self, shape: Shape) -> float:
        """Of a token, in the pages of the worker that has most of it."""
        return self.kv_bytes_per_token * self.anatomy.worker_kv_share(shape)

    def cost_in(self, shape: Shape) -> StepCost:
        """Of a pass of this shape, through all its stages."""
        return self._part(self.cost, shape)

    def _part(self, cost: StepCost, shape: Shape) -> StepCost:
        anatomy, tp = self.anatomy, shape.tp
        dense, routed = self._token_s(cost, shape)
        token_s, seq_s, latency_s = self._exchanged(shape)
        spread = cost.expert_token_s + routed
        return replace(
            cost,
            prefill_fix_s=self._fixed_s(cost.prefill_fix_s, cost, shape) + latency_s,
            decode_fix_s=self._fixed_s(cost.decode_fix_s, cost, shape) + latency_s,
            token_s=dense / tp + token_s,
            attention_s=cost.attention_s / tp,
            decode_seq_s=max(0.0, cost.decode_seq_s - routed) / tp + seq_s,
            kv_token_s=cost.kv_token_s * anatomy.worker_kv_share(Shape(tp)),
            expert_token_s=spread / tp,
            large=self._part(cost.large, shape) if cost.large else None,
            floor=self._part(cost.floor, shape) if cost.floor else None,
        )

    def _token_s(self, cost: StepCost, shape: Shape) -> tuple[float, float]:
        """What a token takes outside the experts that other ranks share, and in them: the weights
        that it is multiplied with tell them apart."""
        anatomy = self.anatomy
        if shape.ep == 1 or not anatomy.num_experts:
            return cost.token_s, 0.0
        active = anatomy.expert_bytes * anatomy.num_active / anatomy.num_experts
        share = active / (anatomy.weight_bytes - anatomy.expert_bytes + active)
        return cost.token_s * (1.0 - share), cost.token_s * share

    def _fixed_s(self, fix_s: float, cost: StepCost, shape: Shape) -> float:
        """Reading a worker's weights, of all stages, and what is nobody's part."""
        anatomy = self.anatomy
        read_s = anatomy.weight_bytes / self.kv_bytes_per_token * cost.kv_token_s
        read_s = min(read_s, fix_s) if read_s else fix_s
        mine = anatomy.worker_weight_bytes(Shape(shape.tp, 1, shape.ep))
        return fix_s - read_s + read_s * mine / anatomy.weight_bytes

    def _exchanged(self, shape: Shape) -> tuple[float, float, float]:
        """Seconds of a prompt's token, of a decode, and of a pass, on the way between workers."""
        anatomy, tp, pp, ep = self.anatomy, shape.tp, shape.pp, shape.ep
        row_s = anatomy.row_bytes / self.link_bytes_per_s
        reduces = 2 * anatomy.num_layers if tp > 1 else 0
        token_s = reduces * self._row_sum_s(tp)
        num_hops = reduces * 2.0 * math.log2(tp)
        if ep > 1 and anatomy.num_experts:
            exchanges = 2 * anatomy.num_sparse_layers
            token_s += exchanges * anatomy.num_active * (ep - 1) / ep * row_s
            num_hops += exchanges
        sends = pp if pp > 1 else 0
        token_s += max(0, sends - 1) * row_s
        back_s = row_s if sends else 0.0
        return token_s, token_s + back_s, (num_hops + sends) * anatomy.hop_s

    def _row_sum_s(self, tp: int) -> float:
        """Of one token's row in an all-reduce, beside its latency."""
        anatomy = self.anatomy
        if anatomy.sum_bytes_per_s:
            return (tp + 1) / 3 * anatomy.row_bytes / anatomy.sum_bytes_per_s
        return 2.0 * (tp - 1) / tp * anatomy.row_bytes / (REDUCED * self.link_bytes_per_s)
