"""The part of every block that a worker's pages are, in the words of copy plans."""

from nodeserve.config import ModelConfig
from nodeserve.model.kv import KvLayout
from nodeserve.policy.copy_plan import PageGeometry, PageShard


def page_shard(config: ModelConfig, layout: KvLayout, joined: bool = False) -> PageShard:
    """config: the whole model's; layout: our part; joined: whether the device keeps K and V of a
    head side by side, instead of all heads' K before all heads' V."""
    planes, head_dim = layout.planes, layout.head_dim
    if joined:
        planes, head_dim = 1, head_dim * planes
    whole = PageGeometry(
        config.num_layers,
        config.num_kv_heads,
        layout.block_size,
        head_dim,
        layout.dtype.itemsize,
        planes,
    )
    first_layer, first_head = layout.first_layer, layout.first_kv_head
    return PageShard(
        whole,
        range(first_layer, first_layer + layout.num_layers),
        range(first_head, first_head + layout.num_kv_heads),
    )
