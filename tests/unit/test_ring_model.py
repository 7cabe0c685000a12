"""The model of the ring: its mistakes are all tried, and one is found where spin is installed."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

RING = Path(__file__).parents[2] / "csrc" / "ring"
MODEL = "".join(path.read_text() for path in sorted(RING.glob("*.pml")))
SCRIPT = (RING / "model.sh").read_text()
PAGE = (RING.parents[1] / "docs" / "ring-model.md").read_text()
TABLE = re.search(r"<< 'END'\n(.*?)\nEND", SCRIPT, re.DOTALL)
assert TABLE is not None
ROWS = [line.split() for line in TABLE[1].splitlines()]
CONDITION = re.compile(r"^ *#(?:if|ifdef|ifndef) (.*)$", re.MULTILINE)


def conditions() -> set[str]:
    """Names that the model is compiled with or without."""
    return {name for line in CONDITION.findall(MODEL) for name in re.findall(r"[A-Z]\w+", line)}


def test_every_mistake_of_the_model_is_tried_and_no_other() -> None:
    mistakes = [name for name, *_ in ROWS if name.startswith("BUG_")]
    assert sorted(mistakes) == sorted(name for name in conditions() if name.startswith("BUG_"))
    assert all(expected != "holds" for name, expected, *_ in ROWS if name in mistakes)


def test_runs_set_only_what_the_model_reads() -> None:
    read = conditions()
    for name, _, *options in ROWS:
        for option in options:
            assert option.removeprefix("-D").split("=")[0] in read, (name, option)


def test_the_page_lists_every_run() -> None:
    assert [name for name, *_ in ROWS if f"`{name.removeprefix('BUG_')}`" not in PAGE] == []


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("spin") or not shutil.which("gcc"), reason="no spin or gcc")
def test_the_checker_tells_a_lost_wake_up_from_the_code_as_it_is(tmp_path: Path) -> None:
    ring = tmp_path / "csrc" / "ring"
    ring.mkdir(parents=True)
    for path in (*RING.glob("*.pml"), RING / "model.sh"):
        shutil.copy(path, ring)
    run = [str(ring / "model.sh"), "BUG_NO_OWN_RING"]
    assert subprocess.run(run, check=False, timeout=60).returncode == 0
    script = (ring / "model.sh").read_text()
    (ring / "model.sh").write_text(re.sub("options -D.run", "options", script))
    assert subprocess.run(run, check=False, timeout=60).returncode == 1
