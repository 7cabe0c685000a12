"""A node as real processes: the real server, real rings, the real step loop, a fake model.

`python -m tests.fakes.node_process '{"socket": ..., "layout": "1p1d", ...}'` runs one until it is
told to stop, prints "ready" on stdout once, and exits with the server's own code. `fake` among the
settings is passed to the fake model (see tests/fakes/worker.py).
"""

import asyncio
import json
import sys
from pathlib import Path

import uvloop

from nodeserve.checkpoint import Checkpoint
from nodeserve.config import EngineConfig, ModelConfig
from nodeserve.coordinator.placement import resolve
from nodeserve.coordinator.server import Server
from nodeserve.errors import NodeServeError
from nodeserve.gpus import Gpus
from nodeserve.types import StartEvent

FAKE_WORKER = (sys.executable, "-m", "tests.fakes.worker")
NO_GPUS = Gpus(obstacle="a test has none")
VOCAB = 97
MODEL = ModelConfig("llama", VOCAB, 8, 8, 1, 1, 1, 8, 512, 1e-5, 1e4)


def on_event(event: StartEvent) -> None:
    if event.phase == "ready":
        sys.stdout.write("ready\n")
        sys.stdout.flush()


def main() -> None:
    settings = json.loads(sys.argv[1])
    fake = json.dumps(settings.pop("fake", {}))
    defaults = {"max_num_seqs": 16, "max_num_batched_tokens": 64, "kv_memory": 1 << 20}
    config = EngineConfig(**{**defaults, **settings})
    checkpoint = Checkpoint(Path(f"fake:{fake}"), "fake", MODEL, "fake")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            server = Server(resolve(config, checkpoint, NO_GPUS), checkpoint, on_event, FAKE_WORKER)
            code = runner.run(server.run())
        except NodeServeError as error:
            sys.stderr.write(f"{error.code}: {error}\n")
            code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
