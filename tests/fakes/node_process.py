"""A node as real processes: the real server, real rings, the real step loop, a fake model.

`python -m tests.fakes.node_process '{"socket": ..., "layout": "1p1d", ...}'` runs one until it is
told to stop, prints "ready" on stdout once, and exits with the server's own code. `fake` among the
settings is passed to the fake model (see tests/fakes/worker.py). With `gpu_model`, a folder with a
config.json, the workers are GPU workers over the fake CUDA runtime (tests/fakes/cuda_worker.py).
With device "sim" they are simulated ones (tests/fakes/sim_worker.py), with "real" those that serve
`model`, or the embedded one, on the processor (cpu_worker.py), with `leak` simulated ones that lose
something (leaky_worker.py), with `hang` one never starts (hanging_worker.py).
With `exit_grace_s` workers have so long to end by themselves before they are killed.
`tokenizer` is the path of one with TEXT_VOCAB tokens, for clients that send text; `log_level` logs
everything from that level on, of all loggers, to stderr.
"""

import asyncio
import json
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvloop

from nodeserve.checkpoint import Checkpoint
from nodeserve.checkpoint import resolve as resolve_checkpoint
from nodeserve.config import EngineConfig, ModelConfig
from nodeserve.coordinator import supervisor
from nodeserve.coordinator.placement import resolve
from nodeserve.coordinator.server import Server
from nodeserve.errors import NodeServeError
from nodeserve.gpus import Gpu, Gpus
from nodeserve.types import StartEvent
from tests.fakes.hanging_worker import HANG, HANGING_WORKER
from tests.fakes.leaky_worker import LEAK, LEAKY_WORKER
from tests.fakes.sim_worker import QUICK, SIM_WORKER

FAKE_WORKER = (sys.executable, "-m", "tests.fakes.worker")
CPU_WORKER = (sys.executable, "-m", "tests.fakes.cpu_worker")
GPU_WORKER = (sys.executable, "-m", "tests.fakes.cuda_worker")
FAKE_GPUS = Gpus(found=tuple(Gpu(index, "fake", 1 << 30, 1 << 30) for index in range(4)))
NO_GPUS = Gpus(obstacle="a test has none")
VOCAB = 97
TEXT_VOCAB = 264  # of tests.fakes.gguf_writer.gpt2_metadata
MODEL = ModelConfig("llama", VOCAB, 8, 8, 1, 1, 1, 8, 512, 1e-5, 1e4)


def on_event(event: StartEvent) -> None:
    if event.phase == "ready":
        sys.stdout.write("ready\n")
        sys.stdout.flush()


def main() -> None:
    settings = json.loads(sys.argv[1])
    fake = json.dumps(settings.pop("fake", {}))
    gpu_model, is_real = settings.pop("gpu_model", None), settings.pop("real", False)
    supervisor.EXIT_GRACE_S = settings.pop("exit_grace_s", supervisor.EXIT_GRACE_S)
    leak, hang = settings.pop("leak", None), settings.pop("hang", None)
    if (log_level := settings.pop("log_level", None)) is not None:
        logging.basicConfig(level=log_level)
        os.environ["PYTHONASYNCIODEBUG"] = "1"
    tokenizer = settings.pop("tokenizer", None)
    defaults: dict[str, Any] = {
        "max_num_seqs": 16,
        "max_num_batched_tokens": 64,
        "kv_memory": 1 << 20,
    }
    if settings.get("device") == "sim":
        defaults = {"profile": QUICK.name}
    if is_real:
        defaults = {"kv_memory": 64 << 20, "max_model_len": 512}
    config = EngineConfig(**{**defaults, **settings})
    path, model = Path(f"fake:{fake}"), MODEL
    if tokenizer is not None:
        path, model = Path(tokenizer), replace(MODEL, vocab_size=TEXT_VOCAB)
    checkpoint = Checkpoint(path, "fake", model, "fake")
    gpus, command = NO_GPUS, FAKE_WORKER
    if config.device == "sim":
        command = SIM_WORKER
    if is_real:
        checkpoint = resolve_checkpoint(config.model, config.load_format)
        command = CPU_WORKER
    if leak is not None:
        os.environ[LEAK], command = leak, LEAKY_WORKER
    if hang is not None:
        os.environ[HANG], command = hang, HANGING_WORKER
    if gpu_model is not None:
        checkpoint = resolve_checkpoint(gpu_model, config.load_format)
        gpus, command = FAKE_GPUS, GPU_WORKER
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            server = Server(resolve(config, checkpoint, gpus), checkpoint, on_event, command)
            code = runner.run(server.run())
        except NodeServeError as error:
            sys.stderr.write(f"{error.code}: {error}\n")
            code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
