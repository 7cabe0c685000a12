"""What libraries read from the environment when they are first imported, here and in children.

Without a GPU, Triton's kernels are interpreted. Triton reads the variable when it is first
imported, and transformers imports it, so it is set before any test file is collected. Nothing else
reads it; a test of the compiler takes it away.

Threads of torch that wait for each other sleep, as they do in workers: suites run side by side.

Bytecode is kept, also where the environment says not to: hundreds of processes are started, and
compiling our modules again takes each of them as long as all else that it imports.
"""

import gc
import os
import sys
from pathlib import Path

sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if not any(Path(driver).exists() for driver in ("/dev/nvidiactl", "/dev/dxg")):
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_finish() -> None:
    """Modules and tests stay to the end: the collector need not look at them again and again."""
    gc.collect()
    gc.freeze()
