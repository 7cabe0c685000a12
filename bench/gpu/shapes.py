"""The models that are checked and measured: shapes only, the weights are random."""

import json
from dataclasses import replace
from pathlib import Path

from nodeserve.config import ModelConfig, RopeScaling
from tests.reference.export import config_json

LLAMA_8B = ModelConfig(
    architecture="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_position=131072,
    norm_eps=1e-5,
    rope_theta=5e5,
    rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
    bos_token_id=128000,
    eos_token_ids=(128001,),
)
# Small enough that a server starts in seconds, deep and wide enough that a wrong page, a wrong
# head or a wrong position changes the tokens.
SMALL = ModelConfig(
    architecture="llama",
    vocab_size=8192,
    hidden_size=1024,
    intermediate_size=2816,
    num_layers=8,
    num_heads=16,
    num_kv_heads=4,
    head_dim=64,
    max_position=8192,
    norm_eps=1e-5,
    rope_theta=1e4,
    eos_token_ids=(0,),
)
# For rehearsals on a CPU.
TINY = ModelConfig(
    architecture="llama",
    vocab_size=256,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position=2048,
    norm_eps=1e-5,
    rope_theta=1e4,
    eos_token_ids=(0,),
)


def write_config(config: ModelConfig, folder: Path) -> Path:
    """A folder that describes a model and holds no weights: for `--load-format dummy`."""
    folder.mkdir(parents=True, exist_ok=True)
    values = config_json(replace(config, rope_scaling=None))
    if config.rope_scaling is not None:
        values["rope_scaling"] = scaling_json(config.rope_scaling)
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


def scaling_json(scaling: RopeScaling) -> dict[str, object]:
    """As the hub writes llama3's rule."""
    return {
        "rope_type": scaling.kind,
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position,
    }
