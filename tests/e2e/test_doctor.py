"""`nodeserve doctor --selftest` with the embedded model on CPU workers."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.patience import PATIENCE_S
from tests.reference.embedded import needs_embedded_model


@needs_embedded_model
def test_both_layouts_give_the_same_tokens(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nodeserve", "doctor", "--selftest", "--device", "cpu", "--json"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    told = json.loads(done.stdout)
    assert (done.returncode, told["ok"]) == (0, True), told["findings"]
    one, split = told["selftest"]["runs"]
    assert (one["layout"], split["layout"]) == ("1m", "1p1d")
    assert one["tokens"] == split["tokens"] and [len(x) for x in one["tokens"]] == [24] * 4
    assert len({tuple(tokens) for tokens in one["tokens"]}) == 4
    assert (one["num_handoffs"], split["num_handoffs"]) == (0, 4)
    assert split["handoff_bytes"] > 0
    marks = {finding["check"]: finding["mark"] for finding in told["findings"]}
    assert marks["selftest-tokens"] == marks["selftest-words"] == "ok"
    assert list(tmp_path.iterdir()) == []
