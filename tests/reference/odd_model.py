"""A tiny mixture of experts that no shape fits: its heads, KV heads, experts, columns and layers
are divided by no degree, and of its words the last of four tensor ranks have none."""

from pathlib import Path
from typing import Any

import tokenizers
import torch

from nodeserve.layout import parse_layout
from nodeserve.model import kv
from nodeserve.shards import Place, Shard
from tests.reference import hub

CHARACTERS = [chr(code) for code in range(ord("!"), ord("~")) if not chr(code).isupper()]
EOS = len(CHARACTERS)
MAX_LEN, BLOCK_SIZE = 256, 16
_CHANGES: dict[str, Any] = {
    "vocab_size": EOS + 1,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 101,
    "eos_token_id": EOS,
}


def write(folder: Path) -> Path:
    """The model and its tokenizer, whose words are characters."""
    hub.write("mixtral", folder, **_CHANGES)
    words = {character: place for place, character in enumerate(CHARACTERS)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(words, []))
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<end>"])
    made.save(str(folder / "tokenizer.json"))
    return folder


def settings_of(layout: str, model: Path, num_blocks: int = 64) -> dict[str, Any]:
    """Of a node of real workers; who has the largest part of a block has so many."""
    config = hub.checkpoint_in(model).config
    places = [
        Place.of(group.shape, rank)
        for group in parse_layout(layout).groups
        for rank in range(group.shape.num_workers)
    ]
    shards = [Shard(config, place) for place in places]
    parts = [kv.layout_of(config, BLOCK_SIZE, torch.float32, shard) for shard in shards]
    return {
        "layout": layout,
        "model": str(model),
        "real": True,
        "dtype": "float32",
        "max_model_len": MAX_LEN,
        "max_num_batched_tokens": 48,
        "max_num_seqs": 16,
        "kv_memory": num_blocks * max(one.block_bytes for one in parts),
    }
