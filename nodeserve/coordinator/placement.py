"""From what was asked for to what each worker gets: devices, cores, memory, data type.

`resolve` happens once, before any process starts, so that a setting that cannot work is refused
with nothing to clean up.
"""

import os
import shutil
from dataclasses import dataclass, replace

from nodeserve.checkpoint import Checkpoint
from nodeserve.config import EngineConfig
from nodeserve.errors import ConfigError
from nodeserve.layout import Layout, Shape, check_devices, parse_gpus, parse_layout
from nodeserve.policy.blocks import blocks_for
from nodeserve.types import Role

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# A CPU core computes at its full rate from about 64 rows on, so a larger prefill step only makes
# the first of its prompts wait for the last (bench/LOG.md has the numbers).
CPU_BATCHED_TOKENS = 128
MAX_AUTO_KV_BYTES = 1 << 30  # per CPU worker: 46k tokens of the demo model
SHM = "/dev/shm"


@dataclass(frozen=True, slots=True)
class Place:
    """Where one worker runs."""

    role: Role
    cpus: tuple[int, ...]
    num_threads: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything resolved: the settings without "auto", and a place for each worker."""

    config: EngineConfig
    layout: Layout
    places: tuple[Place, ...]
    max_model_len: int
    max_num_batched_tokens: int
    kv_memory: int
    notes: tuple[str, ...]  # what a person should know, one line each


def resolve(config: EngineConfig, checkpoint: Checkpoint) -> Plan:
    """Check the settings against the machine and the model; ConfigError says what to change."""
    check_numbers(config)
    check_device(config)
    cpus = tuple(sorted(os.sched_getaffinity(0)))
    layout = choose_layout(config.layout, len(cpus))
    if config.gpus is not None:
        check_devices(layout, len(parse_gpus(config.gpus)))
    dtype = "bfloat16" if config.dtype == "auto" else config.dtype
    places, notes = share_cores(layout.roles, cpus)
    budget = choose_budget(config)
    max_model_len = choose_context(config, checkpoint)
    token_bytes = checkpoint.config.kv_bytes_per_token(DTYPE_BYTES[dtype])
    block_bytes = token_bytes * config.block_size
    least = block_bytes * (blocks_for(max_model_len, config.block_size) + 1)
    kv_memory = choose_kv_memory(config.kv_memory, least, len(places))
    resolved = replace(
        config,
        device="cpu",
        dtype=dtype,
        layout=str(layout),
        served_model_name=config.served_model_name or checkpoint.served_name,
    )
    return Plan(resolved, layout, places, max_model_len, budget, kv_memory, notes)


def check_numbers(config: EngineConfig) -> None:
    """Ranges of the plain settings, by their option's name."""
    for name in ("max_num_seqs", "max_num_queued_reqs"):
        if getattr(config, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1")
    if config.block_size < 16 or config.block_size % 16:
        raise ConfigError(f"--block-size must be a multiple of 16, got {config.block_size}")
    if config.dtype != "auto" and config.dtype not in DTYPE_BYTES:
        raise ConfigError(f"--dtype {config.dtype}: use auto, {', '.join(DTYPE_BYTES)}")


def check_device(config: EngineConfig) -> None:
    if config.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {config.device}: use auto, cpu or cuda")
    if config.device == "cuda":
        raise ConfigError("this version has CPU workers only: use --device cpu")
    if config.device == "cpu" and config.gpus is not None:
        raise ConfigError("--gpus and --device cpu contradict each other: leave one out")


def choose_layout(text: str | None, num_cpus: int) -> Layout:
    """The layout asked for, or 1p1d where two cores can run it; only single-worker instances."""
    layout = parse_layout(text if text is not None else ("1p1d" if num_cpus > 1 else "1m"))
    if any(group.shape != Shape() for group in layout.groups):
        plain = ",".join(str(replace(group, shape=Shape())) for group in layout.groups)
        raise ConfigError(
            f"layout {layout}: instances of several workers (tp, pp, ep) are not supported yet;"
            f" give each instance one worker, for example {plain}"
        )
    return layout


def share_cores(
    roles: tuple[Role, ...], cpus: tuple[int, ...]
) -> tuple[tuple[Place, ...], tuple[str, ...]]:
    """Disjoint cores for each worker while they last, one thread for each core."""
    count = len(roles)
    if count > len(cpus):
        note = (
            f"{count} workers share {len(cpus)} cores: steps will take turns,"
            " expect uneven times per token"
        )
        shared = tuple(Place(role, (cpus[i % len(cpus)],), 1) for i, role in enumerate(roles))
        return shared, (note,)
    places, first = [], 0
    for index, role in enumerate(roles):
        share = len(cpus) // count + (index < len(cpus) % count)
        places.append(Place(role, cpus[first : first + share], share))
        first += share
    return tuple(places), ()


def choose_context(config: EngineConfig, checkpoint: Checkpoint) -> int:
    """Tokens of prompt and output together."""
    trained = checkpoint.config.max_position
    asked = config.max_model_len
    if asked is None:
        return trained
    if not 2 <= asked <= trained:
        raise ConfigError(
            f"--max-model-len {asked}: use 2 to {trained}, the context that the model was made for"
        )
    return asked


def choose_budget(config: EngineConfig) -> int:
    """Tokens in one step: every running sequence needs one."""
    asked = config.max_num_batched_tokens
    if asked is None:
        return max(CPU_BATCHED_TOKENS, config.max_num_seqs)
    if asked < config.max_num_seqs:
        raise ConfigError(
            f"--max-num-batched-tokens ({asked}) is below --max-num-seqs ({config.max_num_seqs}):"
            " every running sequence needs one token a step"
        )
    return asked


def choose_kv_memory(asked: int | None, least: int, num_workers: int) -> int:
    """Bytes of pages for each worker: what was asked for, or a fair part of what is free."""
    free = min(_available_bytes(), shutil.disk_usage(SHM).free)
    hint = "lower --max-model-len or --kv-memory, or free memory"
    if asked is not None:
        if asked < least:
            raise ConfigError(
                f"--kv-memory {asked} is below the {least} bytes that one sequence of the full"
                " context takes: raise it or lower --max-model-len"
            )
        if asked * num_workers > free:
            raise ConfigError(
                f"--kv-memory {asked} for {num_workers} workers is more than the {free} bytes free"
                f" in memory and {SHM} (docker: --shm-size): {hint}"
            )
        return asked
    fair = min(MAX_AUTO_KV_BYTES, free // (2 * num_workers))
    if max(fair, least) * num_workers > free:
        raise ConfigError(
            f"the pages of one sequence of the full context take {least} bytes a worker, and"
            f" {free} bytes are free in memory and {SHM} (docker: --shm-size): {hint}"
        )
    return max(fair, least)


def _available_bytes() -> int:
    with open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise ConfigError("/proc/meminfo has no MemAvailable line: give --kv-memory")
