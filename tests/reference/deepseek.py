"""Tiny random DeepSeek checkpoints, written by transformers as the hub has them."""

from pathlib import Path
from typing import Any

import torch
import transformers

from nodeserve.checkpoint import Checkpoint
from nodeserve.config_readers import folder_config

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
}
COMMON: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 96,
    "intermediate_size": 200,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 24,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "num_experts_per_tok": 3,
    "n_routed_experts": 12,
    "first_k_dense_replace": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "attn_implementation": "eager",
}
V2_LITE: dict[str, Any] = {
    "q_lora_rank": None,
    "n_shared_experts": 2,
    "topk_method": "greedy",
    "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
}
V2: dict[str, Any] = {
    "q_lora_rank": 40,
    "n_shared_experts": 2,
    "topk_method": "group_limited_greedy",
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 3.0,
    "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False},
}
V3: dict[str, Any] = {
    "q_lora_rank": 40,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
}
V3_PLAIN = {
    **V3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rope_interleave": False,
    "norm_topk_prob": False,
    "tie_word_embeddings": True,
}
KINDS: dict[str, dict[str, Any]] = {
    "v2-lite": V2_LITE,
    "v2": V2,
    "v3": V3,
    "v3-plain": V3_PLAIN,
}


def reference(kind: str) -> transformers.PreTrainedModel:
    """transformers' own model with random weights, the bias of its routers among them."""
    settings, number = {**COMMON, **KINDS[kind]}, kind[1]
    made = getattr(transformers, f"DeepseekV{number}Config")(**settings)
    torch.manual_seed(7)
    model: transformers.PreTrainedModel = getattr(transformers, f"DeepseekV{number}ForCausalLM")(
        made
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.4 if name.endswith("gate.weight") else 0.08
            parameter.copy_(torch.randn_like(parameter) * spread + ("norm" in name))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.2)
    return model


def saved(model: transformers.PreTrainedModel, folder: Path) -> Checkpoint:
    """The model as a folder of the hub, and what it looks like to us."""
    model.save_pretrained(folder)
    return Checkpoint(folder, "safetensors", folder_config(folder), folder.name)
