"""Is there room for the weights and the pages? Asked before anything is loaded.

What is free changes while one looks; this only saves whoever asks for far too much from waiting
until the weights are there to hear it.
"""

import shutil
from collections.abc import Sequence

from nodeserve.errors import ConfigError
from nodeserve.gpus import Gpu

SHM = "/dev/shm"
MAX_AUTO_KV_BYTES = 1 << 30  # per CPU worker: 46k tokens of the demo model
MAX_SIM_BLOCKS = 1 << 22  # the imitated memory costs none, but each of its blocks some 100 bytes


def check_kv_memory(asked: int | None, least: int) -> None:
    if asked is not None and asked < least:
        raise ConfigError(
            f"--kv-memory {asked} is below the {least} bytes that one sequence of the full"
            " context takes: raise it or lower --max-model-len"
        )


def check_simulated_memory(asked: int | None, block_bytes: int) -> None:
    most = MAX_SIM_BLOCKS * block_bytes
    if asked is not None and asked > most:
        raise ConfigError(
            f"--kv-memory {asked}: at most {most} bytes, {MAX_SIM_BLOCKS} blocks, can be simulated"
        )


def check_gpus(workers: Sequence[int], found: Sequence[Gpu], worker_bytes: int) -> None:
    """`workers`: the GPU of each; `worker_bytes`: of its weights and one sequence."""
    for gpu in found:
        needed = workers.count(gpu.index) * worker_bytes
        if needed > gpu.free_bytes:
            raise ConfigError(
                f"GPU {gpu.index} has {gpu.free_bytes} bytes free, and the weights and one sequence"
                f" of the full context take {needed}: choose other --gpus or a smaller model, lower"
                " --max-model-len, or end what else runs there"
            )


def choose_kv_memory(asked: int | None, least: int, num_workers: int, weight_bytes: int) -> int:
    """Bytes of pages for each CPU worker: what was asked for, or a fair part of what is free once
    each has its weights."""
    memory = _available_bytes()
    free = min(memory - num_workers * weight_bytes, shutil.disk_usage(SHM).free)
    hint = "lower --max-model-len or --kv-memory, use fewer workers, or free memory"
    if memory < num_workers * weight_bytes:
        raise ConfigError(
            f"the weights take {weight_bytes} bytes for each of {num_workers} workers, and {memory}"
            " bytes are free in memory: use fewer workers or a smaller model, or free memory"
        )
    if asked is not None:
        if asked * num_workers > free:
            raise ConfigError(
                f"--kv-memory {asked} for {num_workers} workers is more than the {free} bytes free"
                f" in memory and {SHM} (docker: --shm-size) beside the weights: {hint}"
            )
        return asked
    fair = min(MAX_AUTO_KV_BYTES, free // (2 * num_workers))
    if max(fair, least) * num_workers > free:
        raise ConfigError(
            f"the pages of one sequence of the full context take {least} bytes a worker, and"
            f" {free} bytes are free in memory and {SHM} (docker: --shm-size) beside the weights:"
            f" {hint}"
        )
    return max(fair, least)


def _available_bytes() -> int:
    with open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise ConfigError("/proc/meminfo has no MemAvailable line: give --kv-memory")
