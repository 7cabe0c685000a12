"""python -m bench.gateway.node SOCKET PROFILE: simulated workers behind the real coordinator, with
the demo model's tokenizer; says "ready" and serves until SIGTERM."""

import asyncio
import sys

import uvloop

from bench.gateway.worker import WORKER
from nodeserve.checkpoint import resolve as resolve_checkpoint
from nodeserve.config import EngineConfig
from nodeserve.coordinator.placement import resolve
from nodeserve.coordinator.server import Server
from nodeserve.gpus import Gpus
from nodeserve.types import StartEvent

LAYOUT = "4m"


def main() -> None:
    socket, profile = sys.argv[1:]
    checkpoint = resolve_checkpoint()
    config = EngineConfig(layout=LAYOUT, device="sim", profile=profile, socket=socket)
    plan = resolve(config, checkpoint, Gpus(obstacle="they are simulated"))

    def on_event(event: StartEvent) -> None:
        if event.phase == "ready":
            print("ready", flush=True)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        sys.exit(runner.run(Server(plan, checkpoint, on_event, WORKER).run()))


if __name__ == "__main__":
    main()
