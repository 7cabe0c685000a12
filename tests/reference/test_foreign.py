"""Models that are no family of ours, by transformers' own code over our pages."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from nodeserve.checkpoint import Checkpoint
from nodeserve.config_readers import folder_config
from nodeserve.errors import ModelError
from nodeserve.layout import Shape
from nodeserve.model import families, kv
from nodeserve.model.backend import make_ops
from nodeserve.shards import check_fits
from tests.reference import hub
from tests.reference.driver import Driver

OTHERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gpt_neox": (transformers.GPTNeoXConfig, {**hub.SHAPE, "intermediate_size": 120}),
    "gpt2": (
        transformers.GPT2Config,
        {"vocab_size": 211, "n_embd": 96, "n_layer": 3, "n_head": 6, "n_positions": 512},
    ),
    "gemma2": (
        transformers.Gemma2Config,
        {
            **hub.SHAPE,
            "intermediate_size": 120,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "sliding_window": 24,
            "attn_logit_softcapping": 5.0,
        },
    ),
    "phi": (transformers.PhiConfig, {**hub.SHAPE, "intermediate_size": 120}),
    "phi3": (
        transformers.Phi3Config,
        {
            **hub.SHAPE,
            "intermediate_size": 120,
            "num_key_value_heads": 2,
            "sliding_window": 24,
            "partial_rotary_factor": 0.5,
        },
    ),
    "starcoder2": (
        transformers.Starcoder2Config,
        {
            **hub.SHAPE,
            "intermediate_size": 120,
            "num_key_value_heads": 2,
            "sliding_window": 24,
        },
    ),
    "phimoe": (
        transformers.PhimoeConfig,
        {
            **hub.SHAPE,
            "intermediate_size": 40,
            "num_key_value_heads": 2,
            "num_local_experts": 4,
        },
    ),
    "olmoe": (
        transformers.OlmoeConfig,
        {
            **hub.SHAPE,
            "intermediate_size": 40,
            "num_key_value_heads": 3,
            "num_experts": 6,
            "num_experts_per_tok": 2,
        },
    ),
}
PROMPTS = [[(7 * i * i + n) % 211 for i in range(n)] for n in (61, 7, 90)]


def write(name: str, folder: Path, **changes: Any) -> transformers.PreTrainedModel:
    kind, settings = OTHERS[name]
    torch.manual_seed(3)
    make: Any = transformers.AutoModelForCausalLM.from_config
    settings = {**settings, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0, **changes}
    settings["attn_implementation"] = "eager"
    model: transformers.PreTrainedModel = make(kind(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    model.save_pretrained(folder)
    return model


def ours(folder: Path, dtype: torch.dtype = torch.float32) -> Driver:
    checkpoint = Checkpoint(folder, "safetensors", folder_config(folder), "tiny")
    config = checkpoint.config
    ops = make_ops(config, dtype)
    model = families.build(config, lambda name: torch.empty(0), ops)
    return Driver(model, ops, kv.layout_of(config, 16, dtype))


@pytest.mark.parametrize("name", OTHERS)
def test_logits_and_tokens_equal_transformers_own(name: str, tmp_path: Path) -> None:
    model = write(name, tmp_path)
    driver = ours(tmp_path)
    for prompt, found in zip(PROMPTS, driver.whole(PROMPTS), strict=True):
        wanted = hub.logits_of(model, [prompt])
        assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max().clamp(min=1.0)
    for prompt, answer in zip(PROMPTS, driver.greedy(PROMPTS, 8, chunk=33), strict=True):
        logits = hub.logits_of(model, [prompt + answer[:-1]])[len(prompt) - 1 :]
        assert logits.argmax(-1).tolist() == answer


def test_a_family_of_ours_runs_as_theirs_where_that_is_asked_for(tmp_path: Path) -> None:
    model = hub.write("qwen3-moe", tmp_path)
    config = folder_config(tmp_path, "transformers")
    assert config.architecture == "transformers" and folder_config(tmp_path).foreign is None
    ops = make_ops(config, torch.float32)
    built = families.build(config, lambda name: torch.empty(0), ops)
    found = Driver(built, ops, kv.layout_of(config, 16, torch.float32)).whole(PROMPTS)
    assert (torch.cat(found) - hub.logits_of(model, PROMPTS)).abs().max() < 1e-4


REFUSED = [
    ("gpt2", {"architectures": ["GPT2Model"]}, "'gpt2' is not supported, only .*decoder that"),
    ("gemma2", {"layer_types": ["full_attention", "mamba", "full_attention"]}, "layer_types"),
    ("gpt2", {"n_positions": None}, "does not say max_position_embeddings"),
    ("phi", {"num_attention_heads": 0}, "num_attention_heads is 0"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_what_cannot_run_is_refused_from_its_file(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write(name, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ModelError, match=message):
        folder_config(tmp_path)


def test_positions_end_where_longrope_lengthens_its_waves(tmp_path: Path) -> None:
    """For all of a pass at once: a request of 61 tokens beside one of 90 had other logits."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    changes = {"original_max_position_embeddings": 64, "sliding_window": None}
    model = write("phi3", tmp_path, rope_parameters={**rope, "rope_theta": 1e4}, **changes)
    assert folder_config(tmp_path).max_position == 64
    found = ours(tmp_path).whole(PROMPTS[:1])[0]
    assert (found - hub.logits_of(model, PROMPTS[:1])).abs().max() < 1e-4


def test_a_window_that_attention_is_not_told_of_is_refused_by_name(tmp_path: Path) -> None:
    write("phimoe", tmp_path, sliding_window=24)
    with pytest.raises(ModelError, match="phimoe cannot be served: it wants a window of 24 tokens"):
        ours(tmp_path).whole(PROMPTS)


def test_only_families_of_ours_where_that_is_asked_for(tmp_path: Path) -> None:
    write("gpt2", tmp_path)
    with pytest.raises(ModelError, match="'gpt2' is not supported, only llama"):
        folder_config(tmp_path, "nodeserve")


def test_one_worker_an_instance(tmp_path: Path) -> None:
    write("gpt2", tmp_path)
    with pytest.raises(ModelError, match="gpt2 runs as transformers' code, on one worker"):
        check_fits(folder_config(tmp_path), Shape(tp=2))


def test_attention_that_pages_do_not_do_is_refused_by_name(tmp_path: Path) -> None:
    """Sinks are what gpt-oss tells its attention besides."""
    write("phi", tmp_path)
    driver = ours(tmp_path)
    attention = driver._model._attention  # type: ignore[attr-defined]
    inside = attention.__class__.__call__

    def with_sinks(self: Any, *args: Any, **told: Any) -> Any:
        return inside(self, *args, s_aux=torch.zeros(6), **told)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention.__class__, "__call__", with_sinks)
        with pytest.raises(ModelError, match="phi cannot be served: it wants s_aux"):
            driver.whole(PROMPTS)


def test_a_model_whose_attention_cannot_be_replaced_is_refused(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"vocab_size": 211, "hidden_size": 96, "n_layer": 2, "n_head": 6}
    model = transformers.BloomForCausalLM(transformers.BloomConfig(**settings))
    model.config.max_position_embeddings = 512
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="bloom cannot be served: .* no interface"):
        ours(tmp_path)
