"""How often a check repeats, or in which cases: `make check` with a few seeds, `make test` with
more, `make test-long` with many."""

import os
from typing import Any, TypeVar

import pytest

LONG = "NODESERVE_LONG_TESTS"
Chosen = TypeVar("Chosen")


def repeats(few: Chosen, many: Chosen) -> Chosen:
    return many if os.environ.get(LONG) else few


def seeds(first: int, total: int) -> list[Any]:
    """Of so many, those after the first are left to `make test`."""
    return [
        *range(first),
        *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(first, total)),
    ]
