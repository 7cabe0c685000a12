"""How often a check on random input repeats: `make test` a few times, `make test-long` many."""

import os

LONG = "NODESERVE_LONG_TESTS"


def repeats(few: int, many: int) -> int:
    return many if os.environ.get(LONG) else few
