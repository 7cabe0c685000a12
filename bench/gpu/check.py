"""Everything a GPU must show, in one run on a machine with one NVIDIA GPU: `make gpu-check`.

    python -m bench.gpu.check [--only NAME ...] [--budget SECONDS] [--out FOLDER] [--rehearse]

No network, under ten minutes, a table of what passed with a ratio per line, the record as JSON
after each section, its short form as the last line. The exit code is 0 only if every check passed.

--rehearse runs the same sections on the CPU with tiny shapes and a pretended CUDA runtime. It finds
this program's own bugs and proves nothing about GPUs; every part of its output says so.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from bench.gpu import table
from bench.gpu.plan import TOTAL_S, Section, chosen, expected_s
from bench.gpu.record import Heading, as_json, brief, heading, stem, write
from bench.gpu.runner import Result, Runs, Task
from bench.gpu.wheels import WHEELS, install
from bench.report import commit, emit
from nodeserve.gpus import find_gpus

ROOT = Path(__file__).parents[2]
PATIENCE = 6.0  # of a rehearsal: a CPU that interprets kernels and has others to serve
REHEARSED = "REHEARSAL on the CPU with a pretended CUDA runtime: proves nothing about GPUs"


class Report:
    """Shows and writes each section as it ends."""

    def __init__(self, head: Heading, folder: Path) -> None:
        self.results: list[Result] = []
        self._head = head
        self._path = folder / f"{stem(head)}.json"
        self._table = self._path.with_suffix(".txt")
        self._table.write_text("")

    def say(self, text: str) -> None:
        print(text, flush=True)
        with self._table.open("a", encoding="utf-8") as file:
            file.write(f"{text}\n")

    def on_result(self, result: Result) -> None:
        self.results.append(result)
        self.say(table.section_rows(result))
        write(self._path, as_json(self._head, self.results, complete=False))

    def close(self) -> int:
        values = as_json(self._head, self.results, complete=True)
        write(self._path, values)
        for line in table.against(self.results):
            self.say(line)
        self.say(f"\n{table.closing(self.results)}; {self._path}")
        if self._head.rehearsal:
            self.say(REHEARSED)
        emit(brief(values, self._path))
        return 0 if table.succeeded(self.results) else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What a GPU must show, in one run.")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these sections")
    parser.add_argument("--budget", type=float, default=None, metavar="SECONDS")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "out", metavar="FOLDER")
    parser.add_argument("--commit", default=commit(), help="where the files are no repository")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU; proves nothing")
    options = parser.parse_args()
    options.patience = PATIENCE if options.rehearse else 1.0
    options.budget = options.budget or TOTAL_S * options.patience
    return options


def environment(site: Path, rehearse: bool) -> dict[str, str]:
    """What the sections' processes need on top of ours: this tree, and the wheels brought along."""
    paths = [str(ROOT), str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    # Triton reads it when it is first imported: kernels are interpreted.
    return {**found, "TRITON_INTERPRET": "1"} if rehearse else found


def run(options: argparse.Namespace, sections: tuple[Section, ...]) -> int:
    began_s = time.monotonic()
    gpus = find_gpus()
    if not gpus.found and not options.rehearse:
        print(f"gpu-check: no GPU to check here: {gpus.obstacle}", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    head = heading(options.commit, options.rehearse, options.budget, gpus)
    report = Report(head, options.out)
    if options.rehearse:
        report.say(REHEARSED)
    cards = ", ".join(gpu.name for gpu in gpus.found) or "no GPU"
    report.say(
        f"gpu-check of {head.commit}, {head.began}: {cards}, driver {head.machine['driver']}"
    )
    report.say(f"{len(sections)} sections, about {expected_s(sections):.0f} s on an H200\n")
    with tempfile.TemporaryDirectory(prefix="nodeserve-gpu-check-") as folder:
        site = Path(folder, "site")
        for problem in install(WHEELS, site):
            report.say(f"brought along in vain: {problem}")
        more = ("--rehearse",) if options.rehearse else ()
        task = Task(options.out, more, environment(site, options.rehearse))
        left_s = options.budget - (time.monotonic() - began_s)
        Runs(task, left_s, report.on_result, options.patience).run(sections)
    return report.close()


def main() -> int:
    options = arguments()
    try:
        sections = chosen(options.only)
    except ValueError as problem:
        print(f"gpu-check: {problem}", file=sys.stderr)
        return 2
    return run(options, sections)


if __name__ == "__main__":
    sys.exit(main())
