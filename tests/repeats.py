"""How often a check repeats, or in which cases: `make test` a few times, `make test-long` many."""

import os
from typing import TypeVar

LONG = "NODESERVE_LONG_TESTS"
Chosen = TypeVar("Chosen")


def repeats(few: Chosen, many: Chosen) -> Chosen:
    return many if os.environ.get(LONG) else few
