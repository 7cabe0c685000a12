"""python -m tests.fakes.hanging_worker --spec JSON: a fake worker, of which number 1 never starts.

`NODESERVE_TEST_HANG` names the phase of its start in which it stands still.
"""

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

from nodeserve.config import WorkerSpec
from nodeserve.worker.contract import Device, Progress, Source, Team
from nodeserve.worker.handoff import HostTransfer
from nodeserve.worker.process import main
from tests.fakes import worker

HANG = "NODESERVE_TEST_HANG"
HANGING_WORKER = (sys.executable, "-m", "tests.fakes.hanging_worker")
REPORTED = ("import", "device", "weights", "pages", "warm-up")
PHASES = ("process", *REPORTED, "ready", "peers")
INDEX = 1  # of the worker that hangs


def stand_still() -> NoReturn:
    while True:
        signal.pause()


class Deaf(HostTransfer):
    """Never has a peer's pool."""

    def __init__(self, transfer: HostTransfer) -> None:
        self.__dict__ = transfer.__dict__

    def attach(self, team: int, sources: Sequence[Source]) -> None:
        stand_still()


def load(spec: WorkerSpec, progress: Progress, team: Team) -> Device:
    phase = os.environ[HANG] if spec.index == INDEX else ""
    for name in REPORTED:
        progress(name, 0, 1)
        if name == phase:
            stand_still()
        progress(name, 1, 1)
    device = worker.load(spec, progress, team)
    if phase == "ready":
        stand_still()
    if phase == "peers":
        assert isinstance(device.transfer, HostTransfer)
        device = replace(device, transfer=Deaf(device.transfer))
    return device


if __name__ == "__main__":
    spec = WorkerSpec.from_json(sys.argv[-1])
    if spec.index == INDEX and os.environ[HANG] == "process":
        stand_still()
    sys.exit(main(load))
