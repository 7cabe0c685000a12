"""One target with what the development environment has: changed seeds, or histories.

    python -m tests.fuzz.alone TARGET SECONDS [SEED]

Prints the number of executions; what is found is raised.
"""

import resource
import sys
import time

from hypothesis import HealthCheck, settings
from hypothesis import seed as seeded
from hypothesis.stateful import run_state_machine_as_test

from tests.fuzz import havoc
from tests.fuzz.machines import MACHINES, NodeMachine
from tests.fuzz.targets import TARGETS

MEMORY_BYTES = (
    12 << 30
)  # of addresses: an input that asks for all memory is found, and hurts nobody
EXAMPLES = 10  # between two looks at the clock
STEPS = 50


def histories(machine: type[NodeMachine], seconds: float, seed: int) -> int:
    """Run so long; how many histories."""
    end_s = time.monotonic() + seconds
    rounds = 0
    while time.monotonic() < end_s:
        chosen = settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        run_state_machine_as_test(seeded(seed + rounds)(machine), settings=chosen)
        rounds += 1
    return rounds * EXAMPLES


def run(name: str, seconds: float, seed: int) -> int:
    """The number of executions of a target by its name."""
    if name in MACHINES:
        return histories(MACHINES[name], seconds, seed)
    return havoc.run(TARGETS[name], seconds, seed)


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    name, seconds = sys.argv[1], float(sys.argv[2])
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else time.time_ns() % 2**32
    sys.stdout.write(f"seed: {seed}\n")
    sys.stdout.write(f"executions: {run(name, seconds, seed)}\n")


if __name__ == "__main__":
    main()
