"""Mixtral, Qwen2-MoE and Qwen3-MoE: Mistral and Qwen with experts in place of the MLP."""

from dataclasses import replace
from pathlib import Path

from nodeserve.config import ModelConfig, MoeConfig
from nodeserve.config_readers import llama
from nodeserve.errors import ModelError
from nodeserve.model_files import Fields

MAX_EXPERTS = 4096


def read_mixtral(fields: Fields, folder: Path) -> ModelConfig:
    config = llama.read(fields, folder)
    moe = MoeConfig(
        num_experts=fields.size("num_local_experts", 8, most=MAX_EXPERTS),
        num_active=fields.size("num_experts_per_tok", 2, most=MAX_EXPERTS),
        intermediate_size=config.intermediate_size,
    )
    return with_experts(fields, config, moe)


def read_qwen(fields: Fields, folder: Path) -> ModelConfig:
    fields.require("use_sliding_window", bool(fields.get("use_sliding_window")), False)
    config = llama.read(fields, folder)
    shared = 0
    if config.architecture == "qwen2_moe":
        shared = fields.size("shared_expert_intermediate_size")
    moe = MoeConfig(
        num_experts=_num_experts(fields),
        num_active=fields.size("num_experts_per_tok", most=MAX_EXPERTS),
        intermediate_size=fields.size("moe_intermediate_size"),
        shared_intermediate_size=shared,
        shared_gate=shared > 0,
        normalize=bool(fields.get("norm_topk_prob")),
        dense_layers=_dense_layers(fields, config.num_layers),
    )
    return with_experts(fields, config, moe)


def with_experts(fields: Fields, config: ModelConfig, moe: MoeConfig) -> ModelConfig:
    """The same with experts; ModelError for numbers that no router can have."""
    if moe.num_active > moe.num_experts:
        raise ModelError(
            f"{fields.where}: {moe.num_active} experts a token, and there are {moe.num_experts}"
        )
    in_group, left = divmod(moe.num_experts, moe.num_groups)
    if left or moe.num_active_groups > moe.num_groups:
        raise ModelError(
            f"{fields.where}: {moe.num_experts} experts cannot be in {moe.num_groups} groups of"
            f" which {moe.num_active_groups} are chosen"
        )
    if moe.num_active > moe.num_active_groups * in_group or in_group < 2 <= moe.num_groups:
        raise ModelError(
            f"{fields.where}: {moe.num_active} experts a token from {moe.num_active_groups} groups"
            f" of {in_group} cannot be chosen"
        )
    return replace(config, moe=moe)


def _num_experts(fields: Fields) -> int:
    """Newer files call it as Mixtral does."""
    other = fields.get("num_local_experts")
    return fields.size("num_experts", other, most=MAX_EXPERTS)


def _dense_layers(fields: Fields, num_layers: int) -> tuple[int, ...]:
    """Those that are named, and all but each `decoder_sparse_step`-th."""
    named = fields.get("mlp_only_layers") or []
    if not isinstance(named, list) or len(named) > num_layers:
        raise fields.wrong("mlp_only_layers", "a list of layers", named)
    step = fields.size("decoder_sparse_step", 1)
    return tuple(n for n in range(num_layers) if n in named or (n + 1) % step)
