"""Tiny random models of every family, as transformers writes them into a folder of the hub."""

from pathlib import Path
from typing import Any

import torch
import transformers

from nodeserve.checkpoint import Checkpoint
from nodeserve.config_readers import folder_config

SHAPE: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 512,
    "attn_implementation": "eager",
}
_GROUPED: dict[str, Any] = {**SHAPE, "intermediate_size": 120, "num_key_value_heads": 2}
_QWEN_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 56}
_OPT = {**SHAPE, "ffn_dim": 200}

SETTINGS: dict[str, tuple[Any, dict[str, Any]]] = {  # transformers' class, and what it is told
    "mixtral": (
        transformers.MixtralConfig,
        {**_GROUPED, "head_dim": 32, "num_local_experts": 5, "num_experts_per_tok": 2},
    ),
    "qwen2-moe": (
        transformers.Qwen2MoeConfig,
        {**_GROUPED, **_QWEN_EXPERTS, "shared_expert_intermediate_size": 72},
    ),
    "qwen3-moe": (
        transformers.Qwen3MoeConfig,
        {
            **_GROUPED,
            **_QWEN_EXPERTS,
            "head_dim": 32,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "opt": (transformers.OPTConfig, {**_OPT, "word_embed_proj_dim": 96}),
    "opt-post-norm": (
        transformers.OPTConfig,
        {**_OPT, "word_embed_proj_dim": 40, "do_layer_norm_before": False},
    ),
    "opt-bare": (
        transformers.OPTConfig,
        {
            **_OPT,
            "word_embed_proj_dim": 96,
            "enable_bias": False,
            "_remove_final_layer_norm": True,
            "tie_word_embeddings": False,
        },
    ),
}


def reference(family: str, seed: int = 7, **changes: Any) -> transformers.PreTrainedModel:
    """Random weights, none of them zero or one: a missing bias or norm would show. `changes`: of
    the family's settings."""
    kind, settings = SETTINGS[family]
    make: Any = transformers.AutoModelForCausalLM.from_config
    model: transformers.PreTrainedModel = make(kind(**{**settings, **changes})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if name.endswith("bias") else 0.08
            is_scale = "norm" in name and name.endswith("weight")
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(values * spread + is_scale)
    return model


def write(family: str, folder: Path, seed: int = 7, **changes: Any) -> transformers.PreTrainedModel:
    """The model, which lies in `folder` by the hub's names afterwards."""
    model = reference(family, seed, **changes)
    model.save_pretrained(folder)
    return model


def write_skewed(
    family: str, folder: Path, prompts: list[list[int]]
) -> transformers.PreTrainedModel:
    """As `write`, with each layer's experts in the order of what these prompts choose, so that the
    first ranks that share them get the hot ones."""
    model = reference(family)
    sparse = [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    with torch.no_grad():
        told = [model(torch.tensor([one]), output_router_logits=True) for one in prompts]
        for place, mlp in enumerate(sparse):
            scores = torch.cat([one.router_logits[place] for one in told])
            chosen = scores.topk(model.config.num_experts_per_tok).indices.flatten()
            order = torch.bincount(chosen, minlength=scores.size(1)).argsort(descending=True)
            for parameter in (mlp.gate.weight, *mlp.experts.parameters()):
                parameter.copy_(parameter[order])  # the experts are the first dimension of each
    model.save_pretrained(folder)
    return model


def checkpoint_in(folder: Path) -> Checkpoint:
    return Checkpoint(folder, "safetensors", folder_config(folder), folder.name)


def logits_of(model: transformers.PreTrainedModel, prompts: list[list[int]]) -> torch.Tensor:
    """transformers' logits of every token of every prompt, one prompt after the other."""
    with torch.no_grad():
        return torch.cat([model(torch.tensor([prompt])).logits[0] for prompt in prompts])
