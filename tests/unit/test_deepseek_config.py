"""What is read of DeepSeek's config.json: the published shapes, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from nodeserve.config import ModelConfig
from nodeserve.config_readers import folder_config
from nodeserve.errors import ModelError

YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
}
V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 129280,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    "bos_token_id": 0,
    "eos_token_id": 1,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
}
V2_LITE: dict[str, Any] = {
    **{key: value for key, value in V3.items() if key != "quantization_config"},
    "model_type": "deepseek_v2",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "q_lora_rank": None,
    "vocab_size": 102400,
    "first_k_dense_replace": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
}


def read(folder: Path, values: dict[str, Any]) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(values))
    return folder_config(folder)


def test_v3(tmp_path: Path) -> None:
    config = read(tmp_path, V3)
    assert config.mla is not None and config.rope_scaling is not None
    assert (config.num_kv_heads, config.head_dim, config.rope_dim) == (1, 192, 64)
    assert config.mla.latent_dim == 576
    # (0.1 ln 40 + 1)^2 / sqrt(192): the share of YaRN that scores get.
    assert config.mla.softmax_scale == pytest.approx(1.3688879**2 / 192**0.5)
    assert config.rope_scaling.attention_factor == 1.0
    assert config.fp8_block == (128, 128)
    assert config.moe is not None
    assert (config.moe.scoring, config.moe.group_score) == ("sigmoid", "top2")
    assert (config.moe.num_groups, config.moe.num_active_groups) == (8, 4)
    assert config.moe.dense_layers == (0, 1, 2)
    assert round(config.num_weights / 1e9) == 671  # as published
    assert round(config.num_active_weights / 1e9) == 38
    assert config.kv_bytes_per_token(2) == 61 * 576 * 2
    assert config.eos_token_ids == (1,)


def test_v2_lite(tmp_path: Path) -> None:
    config = read(tmp_path, V2_LITE)
    assert config.mla is not None and config.mla.q_lora_rank is None
    assert config.mla.softmax_scale == pytest.approx((0.0707 * 3.68887945 + 1) ** 2 / 192**0.5)
    assert config.fp8_block is None
    assert config.moe is not None
    assert (config.moe.scoring, config.moe.choice_bias) == ("softmax", False)
    assert config.moe.num_groups == config.moe.num_active_groups == 1
    assert config.moe.shared_intermediate_size == 2 * 1408
    assert round(config.num_weights / 1e9, 1) == 15.7  # as published
    assert round(config.num_active_weights / 1e9, 1) == 2.7
    assert config.kv_bytes_per_token(2) == 27 * 576 * 2


def test_yarn_without_weights_scales_cos_and_sin(tmp_path: Path) -> None:
    config = read(tmp_path, {**V3, "rope_scaling": YARN})
    assert config.mla is not None and config.rope_scaling is not None
    assert config.mla.softmax_scale == 192**-0.5
    assert config.rope_scaling.attention_factor == pytest.approx(1.3688879)
    config = read(tmp_path, {**V3, "rope_scaling": {**YARN, "mscale": 1, "mscale_all_dim": 0}})
    assert config.rope_scaling is not None
    assert config.rope_scaling.attention_factor == pytest.approx(1.3688879)


def with_yarn(**changes: object) -> dict[str, Any]:
    return {**V3, "rope_scaling": {**V3["rope_scaling"], **changes}}


def with_quantisation(**changes: object) -> dict[str, Any]:
    return {**V3, "quantization_config": {**V3["quantization_config"], **changes}}


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({**V3, "attention_bias": True}, "attention_bias = True is not supported"),
        ({**V3, "hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({**V3, "qk_rope_head_dim": 63}, "qk_rope_head_dim is 63, must be even"),
        ({**V3, "kv_lora_rank": None}, "does not say kv_lora_rank"),
        ({**V3, "rope_theta": 1.0}, "rope_theta is 1.0, must be above 1 for yarn"),
        (with_yarn(mscale_all_dim=1e300), "mscale_all_dim is 1e\\+300, must be 1e-06 to 1e\\+06"),
        (with_yarn(mscale=1e300, mscale_all_dim=1.0), "mscale is 1e\\+300, must be"),
        (with_yarn(beta_slow=5e-324), "beta_slow is 5e-324, must be"),
        (with_yarn(beta_fast=1e308), "beta_fast is 1e\\+308, must be"),
        (with_yarn(factor=1e-320), "factor is 1e-320, must be"),
        ({**V3, "moe_layer_freq": 2}, "moe_layer_freq = 2 is not supported"),
        ({**V3, "scoring_func": "softmax"}, "scoring_func = 'softmax' is not supported"),
        ({**V3, "n_shared_experts": 4097}, "n_shared_experts is 4097, must be a count up to 4096"),
        (
            {**V3, "n_shared_experts": 9, "moe_intermediate_size": 1 << 21},
            "n_shared_experts is 9, must be a count up to 8",
        ),
        ({**V3, "n_group": 7}, "256 experts cannot be in 7 groups"),
        ({**V3, "topk_group": 9}, "8 groups of which 9 are chosen"),
        ({**V3, "n_group": 256, "topk_group": 16}, "16 groups of 1 cannot be chosen"),
        ({**V3, "topk_group": 1, "num_experts_per_tok": 33}, "33 experts a token from 1 groups"),
        ({**V2_LITE, "norm_topk_prob": True}, "norm_topk_prob = True is not supported"),
        ({**V2_LITE, "topk_method": "noaux_tc"}, "must be greedy or group_limited_greedy"),
        (with_quantisation(quant_method="gptq"), "weights quantised by 'gptq' are not supported"),
        (with_quantisation(fmt="e5m2"), "fmt = 'e5m2' is not supported"),
        (with_quantisation(weight_block_size=None), "does not say weight_block_size"),
        (with_quantisation(weight_block_size=[128]), "must be two numbers"),
        (with_quantisation(weight_block_size=[128, 0]), "columns is 0, must be at least 1"),
        ({**V3, "quantization_config": [1]}, "weights quantised by None are not supported"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(
    tmp_path: Path, values: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ModelError, match=complaint):
        read(tmp_path, values)
