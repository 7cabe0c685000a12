"""Without a GPU, Triton's kernels are interpreted.

Triton reads the variable when it is first imported, and transformers imports it, so it is set
before any test file is collected. Nothing else reads it; a test of the compiler takes it away.
"""

import os
from pathlib import Path

if not any(Path(driver).exists() for driver in ("/dev/nvidiactl", "/dev/dxg")):
    os.environ.setdefault("TRITON_INTERPRET", "1")
