"""From what was asked for to what each worker gets: devices, cores, memory, data type.

`resolve` happens once, before any process starts, so that a setting that cannot work is refused
with nothing to clean up.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from nodeserve.checkpoint import Checkpoint
from nodeserve.config import EngineConfig, ModelConfig, Simulated
from nodeserve.config_readers import MODEL_IMPLS
from nodeserve.coordinator.copies import choose_counts
from nodeserve.coordinator.needs import DTYPE_BYTES, dtype_of, needs_of
from nodeserve.coordinator.places import (
    Place,
    check_shapes,
    place_on_cpus,
    place_on_gpus,
    place_simulated,
)
from nodeserve.coordinator.policies import Policies, policies_of
from nodeserve.coordinator.room import (
    check_gpus,
    check_kv_memory,
    check_simulated_memory,
    choose_kv_memory,
)
from nodeserve.errors import ConfigError
from nodeserve.expert_counts import Counts
from nodeserve.gpus import Gpus
from nodeserve.layout import Layout
from nodeserve.policy.blocks import blocks_for
from nodeserve.policy.profile import Profile
from nodeserve.policy.profiles import FAMILIES, PROFILES
from nodeserve.policy.startup import default_timeout_s
from nodeserve.policy.units import ADMISSIONS, DECODE_ALLOCATIONS
from nodeserve.profile_store import path_of, profile_or_family
from nodeserve.types import Role
from nodeserve.weight_files import check_weight_files

# A CPU core computes at its full rate from about 64 rows on, so a larger prefill step only makes
# the first of its prompts wait for the last (bench/LOG.md has the numbers).
CPU_BATCHED_TOKENS = 128
# A GPU reaches its full rate with some thousand rows. Where a step also carries decodes, they wait
# for it: a smaller one bounds the gap between their tokens.
GPU_BATCHED_TOKENS, GPU_MIXED_BATCHED_TOKENS = 8192, 2048
CPU_NUM_SEQS, GPU_NUM_SEQS = 64, 256
CHOICES = {
    "device": ("auto", "cuda", "cpu", "sim"),
    "dtype": ("auto", *DTYPE_BYTES),
    "load_format": ("auto", "dummy"),
    "model_impl": MODEL_IMPLS,
    "attention_backend": ("auto", "flash-attn", "torch", "triton", "reference"),
    "handoff": ("auto", "ipc", "host"),
    "admission": ADMISSIONS,
    "decode_allocation": DECODE_ALLOCATIONS,
    "on_overload": ("reject", "queue"),
}
COUNTS = (
    *("max_num_seqs", "max_num_queued_reqs", "max_num_queued_tokens"),
    *("max_connections", "max_connection_reqs"),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything resolved: the settings without "auto", and a place for each worker."""

    config: EngineConfig
    layout: Layout
    places: tuple[Place, ...]
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_memory: int | None  # bytes for each worker; None: what is left of a GPU, or as profiled
    startup_timeout_s: float
    policies: Policies
    simulated: Simulated | None  # with device "sim"
    notes: tuple[str, ...]  # what a person should know, one line each
    expert_counts: Counts | None = None  # that ranks share experts by; None: as many each


def resolve(config: EngineConfig, checkpoint: Checkpoint, gpus: Gpus) -> Plan:
    """Check the settings against the machine and the model; ConfigError says what to change."""
    check_numbers(config)
    check_names(config)
    check_device(config, gpus)
    if config.device == "sim":
        return resolve_simulated(config, checkpoint)
    on_gpus = config.device != "cpu" and gpus.usable
    foreign = foreign_notes(checkpoint.config, on_gpus)
    layout, places, notes = place_on_gpus(config, gpus) if on_gpus else place_on_cpus(config, gpus)
    max_num_seqs = config.max_num_seqs or (GPU_NUM_SEQS if on_gpus else CPU_NUM_SEQS)
    max_model_len = choose_context(config.max_model_len, checkpoint.config.max_position)
    budget = choose_budget(config, max_num_seqs, fills_step(layout, on_gpus))
    check_shapes(layout, checkpoint.config)
    counts = choose_counts(config, checkpoint.config, layout)
    needs = [
        needs_of(config, checkpoint.config, group.shape, max_model_len) for group in layout.groups
    ]
    weight_bytes, least = map(max, zip(*needs, strict=True))
    check_kv_memory(config.kv_memory, least)
    if on_gpus:
        check_gpus([place.gpus[0] for place in places], gpus.found, weight_bytes + least)
    if checkpoint.kind == "safetensors":
        check_weight_files(checkpoint.path)
    resolved = replace(
        config,
        device="cuda" if on_gpus else "cpu",
        dtype=dtype_of(config),
        layout=str(layout),
        served_model_name=config.served_model_name or checkpoint.served_name,
    )
    return Plan(
        config=resolved,
        layout=layout,
        places=places,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        kv_memory=config.kv_memory
        if on_gpus
        else choose_kv_memory(config.kv_memory, least, len(places), weight_bytes),
        startup_timeout_s=config.startup_timeout or default_timeout_s(weight_bytes),
        policies=policies_of(config, max_num_seqs, budget),
        simulated=None,
        notes=(*notes, *foreign),
        expert_counts=counts,
    )


def resolve_simulated(config: EngineConfig, checkpoint: Checkpoint) -> Plan:
    """The profile says what a device holds; of the model, tokenizer and vocabulary count."""
    assert config.profile is not None, "check_device asks for one"
    layout, places, notes = place_simulated(config)
    profiles = simulated_profiles(config.profile, layout)
    profile = profiles[0]
    max_model_len = choose_context(config.max_model_len, profile.max_model_len)
    max_num_seqs = config.max_num_seqs or profile.max_num_seqs
    token_bytes = [
        one.worker_kv_bytes(group.shape) for one, group in zip(profiles, layout.groups, strict=True)
    ]
    least = config.block_size * (blocks_for(max_model_len, config.block_size) + 1)
    check_kv_memory(config.kv_memory, least * max(token_bytes))
    check_simulated_memory(config.kv_memory, config.block_size * min(token_bytes))
    resolved = replace(
        config,
        dtype="bfloat16",
        layout=str(layout),
        served_model_name=config.served_model_name or checkpoint.served_name,
    )
    budget = choose_budget(config, max_num_seqs, profile.max_num_batched_tokens)
    return Plan(
        config=resolved,
        layout=layout,
        places=places,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        kv_memory=config.kv_memory,
        startup_timeout_s=config.startup_timeout or default_timeout_s(0),
        policies=policies_of(config, max_num_seqs, budget),
        simulated=Simulated(
            config.profile if is_known(config.profile) else str(path_of(config.profile)),
            config.seed,
            checkpoint.config.vocab_size,
            checkpoint.config.eos_token_ids,
        ),
        notes=(*notes, *unmeasured_notes(profiles)),
    )


def unmeasured_notes(profiles: Iterable[Profile]) -> tuple[str, ...]:
    """What to know of passes that no profile has measured."""
    shapes = ", ".join(dict.fromkeys(one.by_formula for one in profiles if one.by_formula))
    return (f"passes of {shapes} by formula, not measured (docs/instances.md)",) if shapes else ()


def simulated_profiles(name: str, layout: Layout) -> list[Profile]:
    """Of each group's shape; ConfigError where the profile has it not."""
    found = profile_or_family(name)
    return [found.of(group.shape) for group in layout.groups]


def is_known(profile: str) -> bool:
    """Whether every worker finds it by this name, wherever stored ones are."""
    return profile in PROFILES or profile in FAMILIES


def check_numbers(config: EngineConfig) -> None:
    """Ranges of the plain settings, by their option's name."""
    for name in COUNTS:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1")
    rate = config.max_connection_rate
    if rate is not None and not 0.0 < rate < math.inf:
        raise ConfigError(f"--max-connection-rate {rate:g}: use a number above 0")
    if not 0.0 <= config.drain_timeout < math.inf:
        raise ConfigError(f"--drain-timeout {config.drain_timeout:g}: use seconds, 0 or more")
    if config.startup_timeout is not None and not 0.0 < config.startup_timeout < math.inf:
        raise ConfigError(f"--startup-timeout {config.startup_timeout:g}: use seconds above 0")
    if config.block_size < 16 or config.block_size % 16:
        raise ConfigError(f"--block-size must be a multiple of 16, got {config.block_size}")
    if not 0.0 < config.gpu_memory_utilization <= 1.0:
        raise ConfigError(
            f"--gpu-memory-utilization {config.gpu_memory_utilization:g}: use a share above 0, at"
            " most 1, such as 0.9"
        )


def check_names(config: EngineConfig) -> None:
    """Settings that are one of a few words."""
    for name, words in CHOICES.items():
        value = getattr(config, name)
        if value not in words:
            *rest, last = words
            raise ConfigError(
                f"--{name.replace('_', '-')} {value}: use {', '.join(rest)} or {last}"
            )


def foreign_notes(model: ModelConfig, on_gpus: bool) -> tuple[str, ...]:
    """What to know of a model that transformers' code computes; ConfigError where it cannot."""
    if model.foreign is None:
        return ()
    if on_gpus:
        raise ConfigError(
            f"{model.foreign.model_type} runs as transformers' code, on CPUs only so far:"
            " give --device cpu"
        )
    return (
        f"{model.foreign.model_type} runs as transformers' own code: slower than nodeserve's"
        " families (docs/models.md)",
    )


def check_device(config: EngineConfig, gpus: Gpus) -> None:
    if config.device == "cpu" and config.gpus is not None:
        raise ConfigError("--gpus and --device cpu contradict each other: leave one out")
    if config.device == "cuda" and not gpus.usable:
        raise ConfigError(f"--device cuda: {gpus.obstacle}; `nodeserve doctor` says more")
    if config.device == "sim" and config.profile is None:
        raise ConfigError(f"--device sim needs a --profile: use one of {', '.join(PROFILES)}")
    if config.workload is not None:
        raise ConfigError("--workload is what --layout auto plans for: give both or neither")
    if config.device != "sim" and config.profile is not None:
        raise ConfigError("--profile is for --device sim or --layout auto: leave it out otherwise")


def choose_context(asked: int | None, trained: int) -> int:
    """Tokens of prompt and output together."""
    if asked is None:
        return trained
    if not 2 <= asked <= trained:
        raise ConfigError(
            f"--max-model-len {asked}: use 2 to {trained}, the context that the model was made for"
        )
    return asked


def fills_step(layout: Layout, on_gpus: bool) -> int:
    """Tokens that make a step efficient."""
    if not on_gpus:
        return CPU_BATCHED_TOKENS
    return GPU_MIXED_BATCHED_TOKENS if Role.MIXED in layout.roles else GPU_BATCHED_TOKENS


def choose_budget(config: EngineConfig, max_num_seqs: int, default: int) -> int:
    """Tokens in one step: every running sequence needs one."""
    asked = config.max_num_batched_tokens
    if asked is None:
        return max(default, max_num_seqs)
    if asked < max_num_seqs:
        raise ConfigError(
            f"--max-num-batched-tokens ({asked}) is below --max-num-seqs ({max_num_seqs}):"
            " every running sequence needs one token a step"
        )
    return asked
