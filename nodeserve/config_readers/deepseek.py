"""DeepSeek-V2, V3 and R1: latent attention and experts, the latter in groups."""

from pathlib import Path

from nodeserve.config import MlaConfig, ModelConfig, MoeConfig
from nodeserve.config_readers.moe import MAX_EXPERTS, with_experts
from nodeserve.config_readers.parts import (
    MAX_LAYERS,
    checked,
    end_tokens,
    fp8_block,
    rope,
    token_id,
    yarn_mscale,
)
from nodeserve.model_files import MAX_POSITION, MAX_SIZE, Fields


def read(fields: Fields, folder: Path) -> ModelConfig:
    _check_variants(fields)
    mla = _mla(fields)
    rope_theta, rope_scaling = rope(fields)
    config = checked(
        fields.where,
        ModelConfig(
            architecture=str(fields.get("model_type")),
            vocab_size=fields.size("vocab_size"),
            hidden_size=fields.size("hidden_size"),
            intermediate_size=fields.size("intermediate_size"),
            num_layers=fields.size("num_hidden_layers", most=MAX_LAYERS),
            num_heads=fields.size("num_attention_heads"),
            num_kv_heads=1,
            head_dim=mla.qk_nope_head_dim + mla.qk_rope_head_dim,
            max_position=fields.size("max_position_embeddings", most=MAX_POSITION),
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            tie_embeddings=bool(fields.get("tie_word_embeddings")),
            eos_token_ids=end_tokens(folder, fields),
            bos_token_id=token_id(fields, "bos_token_id"),
            mla=mla,
            fp8_block=fp8_block(fields),
        ),
    )
    return with_experts(fields, config, _moe(fields, config))


def _check_variants(fields: Fields) -> None:
    """Refuse by name what the model code does not do."""
    fields.require("hidden_act", fields.get("hidden_act") or "silu", "silu")
    for name in ("attention_bias", "mlp_bias"):
        fields.require(name, bool(fields.get(name)), False)
    fields.require("moe_layer_freq", fields.get("moe_layer_freq") or 1, 1)
    scoring = "sigmoid" if fields.get("model_type") == "deepseek_v3" else "softmax"
    fields.require("scoring_func", fields.get("scoring_func") or scoring, scoring)


def _moe(fields: Fields, config: ModelConfig) -> MoeConfig:
    """V2 takes the softmax and knows groups by name; V3 takes sigmoids and has a bias for them."""
    third = config.architecture == "deepseek_v3"
    grouped = third or _v2_groups(fields)
    inner = fields.size("moe_intermediate_size")
    num_shared = fields.integer("n_shared_experts", 0, min(MAX_EXPERTS, MAX_SIZE // inner))
    dense = range(min(fields.integer("first_k_dense_replace", 0), config.num_layers))
    return MoeConfig(
        num_experts=fields.size("n_routed_experts", most=MAX_EXPERTS),
        num_active=fields.size("num_experts_per_tok", most=MAX_EXPERTS),
        intermediate_size=inner,
        shared_intermediate_size=num_shared * inner,
        scoring="sigmoid" if third else "softmax",
        normalize=third and fields.get("norm_topk_prob") is not False,
        routed_scale=fields.number("routed_scaling_factor", 1.0),
        choice_bias=third,
        num_groups=fields.size("n_group", 1) if grouped else 1,
        num_active_groups=fields.size("topk_group", 1) if grouped else 1,
        group_score="top2" if third else "max",
        dense_layers=tuple(dense),
    )


def _v2_groups(fields: Fields) -> bool:
    """Whether V2's router chooses groups first."""
    method = fields.get("topk_method") or "greedy"
    if method not in ("greedy", "group_limited_greedy"):
        raise fields.wrong("topk_method", "greedy or group_limited_greedy", method)
    fields.require("norm_topk_prob", bool(fields.get("norm_topk_prob")), False)
    return bool(method != "greedy")


def _mla(fields: Fields) -> MlaConfig:
    ranked = fields.get("q_lora_rank") is not None
    plain, turned = fields.size("qk_nope_head_dim"), fields.size("qk_rope_head_dim")
    if turned % 2:
        raise fields.wrong("qk_rope_head_dim", "even", turned)
    interleaved = fields.get("rope_interleave")
    return MlaConfig(
        kv_lora_rank=fields.size("kv_lora_rank"),
        q_lora_rank=fields.size("q_lora_rank") if ranked else None,
        qk_nope_head_dim=plain,
        qk_rope_head_dim=turned,
        v_head_dim=fields.size("v_head_dim"),
        softmax_scale=(plain + turned) ** -0.5 * yarn_mscale(fields) ** 2,
        rope_interleaved=interleaved is None or bool(interleaved),
    )
