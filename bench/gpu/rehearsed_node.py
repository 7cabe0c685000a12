"""`nodeserve start` for rehearsals: the real server, GPU workers on the pretended runtime."""

from bench.gpu.bed import REHEARSED_WORKER
from nodeserve import cli
from nodeserve.config import EngineConfig
from nodeserve.coordinator import server
from nodeserve.coordinator.server import OnEvent
from nodeserve.gpus import Gpu, Gpus

PRETENDED = Gpus((Gpu(0, "pretended", 4 << 30, 4 << 30),))


def main() -> None:
    real = server.serve

    def serve(config: EngineConfig, on_event: OnEvent, gpus: Gpus) -> int:
        return real(config, on_event, PRETENDED, REHEARSED_WORKER)

    vars(server).update(serve=serve)
    cli.main()


if __name__ == "__main__":
    main()
