"""What the workers of an instance keep of a model: weights and keys and values, by arithmetic.

Ranks of an expert-parallel instance have everything but the experts each for themselves. Parts are
those of shards.py; what counts is the worker that has most.
"""

from dataclasses import dataclass

from nodeserve.config import ModelConfig
from nodeserve.layout import Shape

HOP_S = 5e-6  # a message between two GPUs over NVLink; set to tables, see shapes.py


@dataclass(frozen=True, slots=True)
class Anatomy:
    """What of a model decides over its parts. Bytes are of the whole model, as devices keep it."""

    num_layers: int
    num_kv_heads: int  # 1: latents, which each tensor rank has whole
    row_bytes: float  # of one token's activations between two layers
    weight_bytes: float  # of all matrices
    edge_bytes: float = 0.0  # of the embedding and the head, which the first stage has
    expert_bytes: float = 0.0  # of the experts that routers choose from
    num_experts: int = 0  # of a sparse layer; 0: the model is dense
    num_active: int = 0  # of these, for each token
    num_sparse_layers: int = 0
    hop_s: float = HOP_S  # latency between two workers
    fixed_pool: bool = False  # pages have a size of their own; else what weights leave of a device
    # Of a sum of two workers in memory that they share; 0: over links, or nobody measured it.
    sum_bytes_per_s: float = 0.0

    def worker_weight_bytes(self, shape: Shape) -> float:
        """Of the worker that has most: one of the first stage. What tensor parallelism copies
        (norms, the matrices of latents) does not count beside the rest."""
        inner = self.weight_bytes - self.edge_bytes
        inner -= self.expert_bytes * (1.0 - self._expert_share(shape))
        return (inner * self._layer_share(shape) + self.edge_bytes) / shape.tp

    def worker_kv_share(self, shape: Shape) -> float:
        """Of a token's keys and values, what the worker has that has most."""
        heads = -(-self.num_kv_heads // shape.tp)
        return heads / self.num_kv_heads * self._layer_share(shape)

    def _layer_share(self, shape: Shape) -> float:
        return -(-self.num_layers // shape.pp) / self.num_layers

    def _expert_share(self, shape: Shape) -> float:
        return -(-self.num_experts // shape.ep) / self.num_experts if self.num_experts else 1.0


def anatomy_of(
    config: ModelConfig,
    value_bytes: float = 2,
    row_value_bytes: float = 2,
    hop_s: float = HOP_S,
    fixed_pool: bool = False,
) -> Anatomy:
    """`value_bytes` of a number in a matrix, `row_value_bytes` of one in the activations."""
    moe = config.moe
    return Anatomy(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        row_bytes=row_value_bytes * config.hidden_size,
        weight_bytes=value_bytes * config.num_weights,
        edge_bytes=value_bytes * config.num_edge_weights,
        expert_bytes=value_bytes * config.num_routed_weights,
        num_experts=moe.num_experts if moe else 0,
        num_active=moe.num_active if moe else 0,
        num_sparse_layers=sum(map(config.is_sparse, range(config.num_layers))),
        hop_s=hop_s,
        fixed_pool=fixed_pool,
    )
