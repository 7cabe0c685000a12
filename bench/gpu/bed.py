"""What a section runs on: the card and Llama-3.1-8B's shape, or in a rehearsal the CPU and a toy.

Sections ask here for everything that differs between both, so that a rehearsal runs their code.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench.gpu.lines import Sheet
from bench.gpu.shapes import LLAMA_8B, SMALL, TINY
from nodeserve.config import ModelConfig, WorkerSpec
from nodeserve.worker.contract import ALONE, Device
from tests.fakes.harness import default_spec

WORKER = (sys.executable, "-m", "nodeserve.worker")
REHEARSED_WORKER = (sys.executable, "-m", "tests.fakes.cuda_worker")


class NoCeiling(LookupError):
    """A section that divides by a number which no earlier section left."""


@dataclass(frozen=True, slots=True)
class Bed:
    """Passed to every section's `run`."""

    sheet: Sheet
    known: dict[str, Any]  # numbers of earlier sections
    rehearsal: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.rehearsal else "cuda:0")

    @property
    def model(self) -> ModelConfig:
        """What is measured."""
        return TINY if self.rehearsal else LLAMA_8B

    @property
    def small(self) -> ModelConfig:
        """What is checked, where the size does not matter."""
        return TINY if self.rehearsal else SMALL

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.rehearsal else torch.bfloat16

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def worker_command(self) -> Sequence[str]:
        return REHEARSED_WORKER if self.rehearsal else WORKER

    @property
    def handoff(self) -> str:
        """The road that pages take: through the host where `ipc` found the direct one closed."""
        return "auto" if self.known.get("ipc_opens", True) else "host"

    def pick(self, real: Any, rehearsed: Any) -> Any:
        """A size for the card, and one that a CPU gets through in a moment."""
        return rehearsed if self.rehearsal else real

    def aim(self, share: float) -> float | None:
        """What must be reached on the card; a rehearsal has numbers and no aims."""
        return None if self.rehearsal else share

    def ceiling(self, name: str) -> float:
        """A number of the section `ceilings`; NoCeiling when there is none to divide by."""
        if name not in self.known:
            raise NoCeiling(f"the section `ceilings` left no {name}: run it before this one")
        return float(self.known[name])

    def spec(self, model: str, **changes: Any) -> WorkerSpec:
        """A worker on the card with dummy weights."""
        values: dict[str, Any] = {
            "device": "cuda",
            "dtype": self.dtype_name,
            "load_format": "dummy",
            "kv_memory": None,
            "gpus": (0,),
            "handoff": self.handoff,
            "model": model,
        }
        return replace(default_spec(**values), **changes)

    def hurry(self) -> None:
        """Where kernels are not the point: a rehearsal's workers compute in plain torch."""
        if self.rehearsal:
            os.environ["NODESERVE_FAKE_PLAIN_PARTS"] = "1"

    def prepare_kernels(self) -> None:
        """To be called before this process runs a kernel: a rehearsal interprets it."""
        if self.rehearsal:
            import tests.fakes.interpreter  # noqa: F401  repairs it

    def load(self, spec: WorkerSpec) -> Device:
        """The device of a worker, in this process."""
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        # Here and not above: a section that starts processes only need not load it.
        self.prepare_kernels()
        if self.rehearsal:
            from tests.fakes.cuda_worker import load
        else:
            from nodeserve.worker.device import load
        return load(spec, lambda phase, done, total: None, ALONE)
