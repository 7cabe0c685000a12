"""python -m nodeserve.worker.probe: what a worker could load here, as JSON lines.

`nodeserve doctor` runs this in a process of its own, because the command line never loads torch,
and because a library made for another machine may not raise but die. Each part is named before it
is tried, so that it is known which one it was.
"""

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from typing import Any

Answer = dict[str, Any]


def native() -> Answer:
    """Our CPU kernels: the instruction set they would run with."""
    from nodeserve._host import CpuEngine

    return {"isa": CpuEngine(1).isa}


def extension() -> Answer:
    """Our CUDA extension; without it CPU workers run."""
    if importlib.util.find_spec("nodeserve._cuda") is None:
        return {"num_devices": None}
    return {"num_devices": importlib.import_module("nodeserve._cuda").device_count()}


def triton() -> Answer:
    if importlib.util.find_spec("triton") is None:
        return {"version": None}
    return {"version": importlib.import_module("triton").__version__}


def torch() -> Answer:
    import torch

    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "num_devices": torch.cuda.device_count(),
        "archs": torch.cuda.get_arch_list(),
    }


def attention() -> Answer:
    """The attention that a common model (grouped heads of 128, bfloat16) would get on GPU 0."""
    import torch

    return {"backend": chosen("cuda:0") if torch.cuda.is_available() else None}


def chosen(device: str) -> str:
    """By what is installed and what the device can do; a worker also tries what was chosen."""
    import torch

    from nodeserve.model.gpu.attention import choice, probe
    from nodeserve.model.gpu.attention.parts import Heads

    heads = Heads(32, 8, 128, 16, torch.bfloat16)
    facts = probe.facts_of(heads, frozenset({None}), torch.device(device))
    found = choice.candidates(facts, "auto")
    return choice.describe(found.decode[0], found.prefill[0], found.refusals)


PARTS: dict[str, Callable[[], Answer]] = {
    "native": native,
    "extension": extension,
    "triton": triton,
    "torch": torch,
    "attention": attention,
}


def main(parts: dict[str, Callable[[], Answer]] = PARTS) -> int:
    for name, ask in parts.items():
        sys.stdout.write(json.dumps({"part": name}) + "\n")
        sys.stdout.flush()
        try:
            line: Answer = {"part": name, "value": ask()}
        except Exception as problem:  # noqa: BLE001 whatever a library raises is the answer
            line = {"part": name, "error": f"{type(problem).__name__}: {problem}"}
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
