"""What every benchmark here needs to say: which commit, which percentile, one JSON line last."""

import json
import math
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

_ROOT = Path(__file__).parent.parent


def commit() -> str:
    """The short id of the commit that is measured; "+" means with changes on top."""
    command = ("git", "-C", str(_ROOT), "describe", "--always", "--dirty=+", "--exclude=*")
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def percentile(samples: Sequence[float], q: float) -> float:
    """The smallest sample that at least the share `q` (0 to 1) of all does not exceed."""
    return sorted(samples)[max(0, math.ceil(q * len(samples)) - 1)]


def emit(values: Mapping[str, object]) -> None:
    """Print the last line: JSON with the commit and everything that was measured."""
    print(json.dumps({"commit": commit(), **values}), flush=True)
