"""What is read of models as their publishers describe them, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from nodeserve.config import MoeConfig
from nodeserve.config_readers import READERS, folder_config
from nodeserve.errors import ModelError

MIXTRAL_8X7B = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN15_MOE_A27B = {
    **QWEN3_30B_A3B,
    "model_type": "qwen2_moe",
    "head_dim": None,
    "intermediate_size": 5632,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "sliding_window": 32768,
    "max_window_layers": 21,
}
OPT_13B = {
    "model_type": "opt",
    "activation_function": "relu",
    "bos_token_id": 2,
    "do_layer_norm_before": True,
    "eos_token_id": 2,
    "ffn_dim": 20480,
    "hidden_size": 5120,
    "max_position_embeddings": 2048,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "vocab_size": 50272,
    "word_embed_proj_dim": 5120,
}
OPT_350M = {
    **OPT_13B,
    "do_layer_norm_before": False,
    "ffn_dim": 4096,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "word_embed_proj_dim": 512,
}


def write(folder: Path, fields: dict[str, Any], **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**fields, **changes}))
    return folder


@pytest.mark.parametrize(
    ("fields", "billions", "active"),
    [
        (MIXTRAL_8X7B, 46.7, 12.9),
        (QWEN3_30B_A3B, 30.5, 3.3),
        (QWEN15_MOE_A27B, 14.3, 2.7),
        (OPT_13B, 12.85, 12.85),
        (OPT_350M, 0.331, 0.331),
    ],
    ids=["mixtral-8x7b", "qwen3-30b-a3b", "qwen1.5-moe-a2.7b", "opt-13b", "opt-350m"],
)
def test_weights_in_all_and_for_a_token_are_as_published(
    tmp_path: Path, fields: dict[str, Any], billions: float, active: float
) -> None:
    config = folder_config(write(tmp_path, fields))
    assert config.num_weights / 1e9 == pytest.approx(billions, rel=0.01)
    assert config.num_active_weights / 1e9 == pytest.approx(active, rel=0.02)


def test_kv_bytes_do_not_know_of_experts(tmp_path: Path) -> None:
    config = folder_config(write(tmp_path, QWEN3_30B_A3B))
    assert config.kv_bytes_per_token(2) == 48 * 2 * 4 * 128 * 2


def test_experts_are_read(tmp_path: Path) -> None:
    assert folder_config(write(tmp_path, MIXTRAL_8X7B)).moe == MoeConfig(8, 2, 14336)
    config = folder_config(write(tmp_path, QWEN15_MOE_A27B))
    assert config.moe == MoeConfig(60, 4, 1408, 5632, shared_gate=True, normalize=False)
    assert config.attention_bias and config.sliding_window is None and config.head_dim == 128


def test_layers_without_experts_are_named_or_counted(tmp_path: Path) -> None:
    changes = {"mlp_only_layers": [0, 7], "decoder_sparse_step": 2, "num_hidden_layers": 8}
    config = folder_config(write(tmp_path, QWEN3_30B_A3B, **changes))
    assert [layer for layer in range(8) if config.is_sparse(layer)] == [1, 3, 5]
    dense = 3 * 2048 * 6144
    attention = 2 * 2048 * 128 * (32 + 4)
    sparse = 2048 * (128 + 3 * 128 * 768)
    total = 2 * 151936 * 2048 + 8 * attention + 5 * dense + 3 * sparse
    assert config.num_weights == total


def test_the_smaller_opt_norms_behind_and_embeds_in_fewer_columns(tmp_path: Path) -> None:
    config = folder_config(write(tmp_path, OPT_350M))
    assert config.opt is not None
    assert (config.opt.embedding_size, config.opt.norm_first) == (512, False)
    assert not config.opt.final_norm
    assert config.tie_embeddings and config.head_dim == 64


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (MIXTRAL_8X7B, {"num_experts_per_tok": 9}, "9 experts a token, and there are 8"),
    (MIXTRAL_8X7B, {"num_local_experts": 0}, "num_local_experts is 0, must be at least 1"),
    (QWEN3_30B_A3B, {"use_sliding_window": True}, "use_sliding_window = True is not supported"),
    (QWEN3_30B_A3B, {"mlp_only_layers": 3}, "mlp_only_layers is 3, must be a list of layers"),
    (QWEN3_30B_A3B, {"moe_intermediate_size": None}, "does not say moe_intermediate_size"),
    (OPT_13B, {"activation_function": "gelu"}, "activation_function = 'gelu' is not supported"),
    (OPT_13B, {"layer_norm_elementwise_affine": False}, "only True"),
    (OPT_13B, {"num_attention_heads": 41}, "41 heads cannot share 5120 columns"),
    (OPT_13B, {"quantization_config": {"quant_method": "gptq"}}, "quantised by 'gptq'"),
]


@pytest.mark.parametrize(("fields", "changes", "message"), REFUSED, ids=lambda one: str(one)[:40])
def test_what_no_family_does_is_refused_by_name(
    tmp_path: Path, fields: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        folder_config(write(tmp_path, fields, **changes))


def test_an_unknown_family_names_those_that_are_known(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'mamba' is not supported, only .*" + ", ".join(READERS)):
        folder_config(write(tmp_path, OPT_13B, model_type="mamba"))
