"""Run the fuzzers: `make fuzz`.

    python -m tests.fuzz [--seconds 60] [TARGET ...]

Each target has so many seconds. A line for each says how often it ran and what was found; the last
line is JSON. The exit code is 1 if anything was found. Logs, inputs and the tools' own environment
are in build/fuzz.
"""

import argparse
import json
import sys
from dataclasses import asdict

from tests.fuzz.machines import MACHINES
from tests.fuzz.targets import TARGETS
from tests.fuzz.tools import Outcome, Tool, alone, atheris, libfuzzer, ring_alone

ALL: dict[str, Tool] = {
    **dict.fromkeys(MACHINES, alone),
    **dict.fromkeys(TARGETS, atheris),
    "ring": libfuzzer,
    "ring-alone": ring_alone,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target")
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(ALL)}; all unless named")
    options = parser.parse_args()
    if unknown := [name for name in options.targets if name not in ALL]:
        parser.error(f"no target {', '.join(unknown)}; there are {', '.join(ALL)}")
    outcomes = []
    for name in options.targets or ALL:
        outcomes.append(ALL[name](name, options.seconds))
        sys.stdout.write(f"{line_of(outcomes[-1])}\n")
        sys.stdout.flush()
    sys.stdout.write(json.dumps({"fuzz": [asdict(one) for one in outcomes]}) + "\n")
    sys.exit(any(one.finding for one in outcomes))


def line_of(outcome: Outcome) -> str:
    head = f"{outcome.target:12} {outcome.tool:10}"
    if outcome.skipped:
        return f"{head} skipped: {outcome.skipped}"
    ran = f"{head} {outcome.executions:>10,} executions in {outcome.seconds:.0f} s"
    return f"{ran}: {outcome.finding or 'nothing found'}"


if __name__ == "__main__":
    main()
