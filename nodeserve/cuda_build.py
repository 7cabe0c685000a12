"""Whether `nodeserve._cuda` was built here, and if not, why: read from what setup.py wrote down.

It looks at files only and imports neither torch nor the extension, so anybody may ask.
"""

import importlib.machinery
import json
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
REMEDY = "install the CUDA toolkit 12.8 or newer and install nodeserve again"


@dataclass(frozen=True, slots=True)
class CudaBuild:
    """`toolkit` ("13.0") and `archs` ("80", "90") are empty where nothing was built."""

    reason: str  # why there is no extension; empty: there is one
    toolkit: str = ""
    archs: tuple[str, ...] = ()


def cuda_build(folder: Path = FOLDER) -> CudaBuild:
    """How the build in `folder` went."""
    try:
        record = json.loads((folder / "_cuda_build.json").read_text())
    except FileNotFoundError:
        return CudaBuild("not built: the extensions were never built here; install nodeserve again")
    if record["reason"]:
        return CudaBuild(f"not built: {record['reason']}; {_remedy(record['reason'])}")
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    if not any((folder / f"_cuda{suffix}").exists() for suffix in suffixes):
        return CudaBuild(
            "built for another Python than this one, or deleted since; install nodeserve again"
        )
    return CudaBuild("", record["toolkit"], tuple(record["archs"].split(";")))


def why_not(folder: Path = FOLDER) -> str:
    """Why `nodeserve._cuda` cannot be imported, and what to do; empty when it can."""
    return cuda_build(folder).reason


def _remedy(reason: str) -> str:
    return "install it without that switch" if "NODESERVE_SKIP_CUDA" in reason else REMEDY
