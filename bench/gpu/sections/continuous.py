"""transformers' continuous batching on the same shape, prompts and lengths, in the same run.

Both are warm before they are timed and both may use nine tenths of the card's memory. transformers
takes the attention it finds on the machine, as we do.
"""

import gc
import inspect
import time
from typing import Any

import torch

from bench.gpu.bed import Bed
from bench.gpu.lines import Line, at_least, check
from bench.gpu.shapes import scaling_json
from bench.gpu.workload import Load, load_for
from nodeserve.config import ModelConfig

AIM = 2.0
MEMORY_SHARE = 0.9


def run(bed: Bed) -> None:
    load = load_for(bed)
    model = build(bed.model, bed.dtype, bed.device)
    prompts = load.prompts(bed.model.vocab_size)
    generate(
        bed, model, prompts[: max(2, len(prompts) // 16)], load
    )  # compiles, captures, allocates
    began_s = time.perf_counter()
    lengths = generate(bed, model, prompts, load)
    seconds = time.perf_counter() - began_s
    bed.sheet.add(*judged(bed, load, lengths, seconds))
    gc.collect()


def judged(bed: Bed, load: Load, lengths: list[int], seconds: float) -> list[Line]:
    name = "transformers' continuous batching"
    if lengths != [load.num_output] * load.num_requests:
        note = f"{len(lengths)} answers of {load.num_requests}, lengths {sorted(set(lengths))}"
        return [check(f"{name} finishes the load", False, note)]
    theirs = sum(lengths) / seconds
    ours = bed.ceiling("load_tokens_per_s")
    bed.sheet.keep(transformers_tokens_per_s=theirs)
    return [
        Line(f"{name}, the same load", "info", theirs, "tokens/s", note=f"{seconds:.2f} s"),
        at_least(
            f"our tokens/s over {name}",
            ours / theirs,
            "x",
            bed.pick(AIM, 1e-6),
            f"{ours:,.0f} against {theirs:,.0f} tokens/s",
        ),
    ]


def build(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Any:
    """A model of this shape with random weights, made on the device."""
    from transformers import AutoModelForCausalLM

    make: Any = AutoModelForCausalLM.from_config
    with torch.device(device):
        model = make(transformers_config(config), dtype=dtype, attn_implementation="sdpa")
    return model.to(device).eval()


def transformers_config(config: ModelConfig) -> Any:
    from transformers import LlamaConfig

    rope = {"rope_type": "default"}
    if config.rope_scaling is not None:
        rope = dict(scaling_json(config.rope_scaling))  # type: ignore[arg-type]
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position,
        rms_norm_eps=config.norm_eps,
        rope_parameters={**rope, "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tie_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def generate(bed: Bed, model: Any, prompts: list[list[int]], load: Load) -> list[int]:
    """The number of tokens written for each prompt, greedily and to the full length."""
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    known = inspect.signature(ContinuousBatchingConfig).parameters
    wanted: dict[str, Any] = {"max_requests_per_batch": load.num_requests}
    room = {"num_blocks": 8, "max_batch_tokens": 256}  # or it takes nine tenths of the host's
    wanted |= room if bed.rehearsal else {"max_memory_percent": MEMORY_SHARE}
    config = ContinuousBatchingConfig(**{k: v for k, v in wanted.items() if k in known})
    make: Any = GenerationConfig
    generation = make(
        max_new_tokens=load.num_output, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    more = {"persistent_manager": True, "progress_bar": False, "warmup": not bed.rehearsal}
    taken = inspect.signature(model.generate_batch).parameters
    answers = model.generate_batch(
        inputs=prompts,
        generation_config=generation,
        continuous_batching_config=config,
        **{k: v for k, v in more.items() if k in taken},
    )
    return [len(answer.generated_tokens) for answer in answers.values()]
