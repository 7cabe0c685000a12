"""Which device a worker runs on. Importing this loads no torch; loading a device does."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from nodeserve.config import WorkerSpec
from nodeserve.errors import ConfigError
from nodeserve.worker.contract import Device, Progress, Team


def load(spec: WorkerSpec, progress: Progress, team: Team) -> Device:
    if spec.device == "sim":
        from nodeserve.worker import device_sim  # only it knows profiles

        return device_sim.load(spec, progress, team)
    if spec.device not in ("cpu", "cuda"):
        raise ConfigError(f"device {spec.device!r}: use cpu, cuda or sim")
    progress("import", 0, 1)
    # Here and not above: it takes most of a second, and by now the coordinator knows we live.
    if spec.device == "cuda":
        with uncollected():
            from nodeserve.worker import device_cuda

        progress("import", 1, 1)
        return device_cuda.load(spec, progress, team)
    with uncollected():
        from nodeserve.worker import device_cpu

    progress("import", 1, 1)
    return device_cpu.load(spec, progress, team)


@contextmanager
def uncollected() -> Iterator[None]:
    """Imports leave next to no garbage; looking for it takes a fifth of torch's import."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
