"""How often experts were chosen: what ranks that share them are asked, and what clients ask.

A row is one token's way through one expert. Layers have their numbers in the whole model (int32),
rows are int64, both little-endian.
"""

from typing import Any, NamedTuple

# ---- coordinator -> worker


class CountExperts(NamedTuple):
    """Say where your rows went. Answer: ExpertsCounted, with the same number."""

    number: int


# ---- worker -> coordinator


class ExpertsCounted(NamedTuple):
    """Where this rank's own rows went since it was ready.

    `layers` are those of its layers that have experts. For each of them `experts` has the rows of
    every expert, and `ranks` those that every rank of the instance computed.
    """

    number: int
    layers: bytes
    experts: bytes
    ranks: bytes


# ---- client -> coordinator


class GetExperts(NamedTuple):
    """Ask for Experts."""


# ---- coordinator -> client


class Experts(NamedTuple):
    """Answer to GetExperts: which model, and what each rank that shares experts has counted."""

    experts: dict[str, Any]
