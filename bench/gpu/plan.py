"""Which sections there are, in which order, and what time each gets. Pure: no clock is read here.

The order puts first what tells most when it fails: whether it builds, what the card gives, whether
the results are right; then how fast it is. Right-or-wrong sections of one wave run side by side;
a section that measures has the card for itself.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

TOTAL_S = 570.0  # of a hard limit of 600: what is left is for the record
MAX_BESIDE = 3


@dataclass(frozen=True, slots=True)
class Section:
    """A module `bench.gpu.sections.NAME` with a `run(bed)`; times in seconds on the target."""

    name: str
    title: str
    expected_s: float
    limit_s: float  # it is ended then; what it has found counts
    least_s: float  # with less than this left it is not begun
    wave: int  # sections of one wave run side by side

    def __post_init__(self) -> None:
        if not 0 < self.least_s <= self.expected_s <= self.limit_s:
            raise ValueError(f"{self.name}: 0 < least <= expected <= limit must hold")


SECTIONS = (
    Section("build", "build and versions", 60, 150, 10, 0),
    Section("ceilings", "ceilings of this card", 20, 45, 12, 1),
    Section("ipc", "pages between two processes", 25, 60, 10, 2),
    Section("tokens", "the same tokens on every road", 70, 120, 20, 3),
    Section("kernels", "kernels against references", 80, 130, 20, 3),
    Section("ranks", "two workers that compute together", 60, 110, 20, 3),
    Section("graphs", "graph replay against eager", 30, 60, 12, 4),
    Section("kill", "a worker killed during a handoff", 40, 75, 15, 4),
    Section("sanitizer", "compute-sanitizer over the copies", 30, 75, 10, 4),
    Section("speed", "steps against their floors", 60, 110, 25, 5),
    Section("handoff", "handoff against a plain copy", 20, 45, 12, 6),
    Section("served", "through the server, two workers", 50, 90, 25, 7),
    Section("continuous", "beside transformers", 50, 90, 25, 8),
    Section("attention", "attention alone", 25, 60, 15, 9),
    Section("experts", "experts alone", 20, 45, 12, 10),
)


def waves(sections: Sequence[Section]) -> Iterator[list[Section]]:
    """Sections that may run side by side, wave after wave, in their order."""
    wave: list[Section] = []
    for section in sections:
        if wave and section.wave != wave[0].wave:
            yield wave
            wave = []
        wave.append(section)
    if wave:
        yield wave


def expected_s(sections: Sequence[Section]) -> float:
    """How long a run takes when every section takes what is expected of it."""
    total = 0.0
    for wave in waves(sections):
        alone = max(section.expected_s for section in wave)
        shared = sum(section.expected_s for section in wave) / MAX_BESIDE
        total += max(alone, shared)
    return total


def time_for(section: Section, left_s: float) -> float | None:
    """Seconds that the section may take, None when it should not be begun."""
    return None if left_s < section.least_s else min(section.limit_s, left_s)


def chosen(names: Sequence[str]) -> tuple[Section, ...]:
    """The sections of these names in their order, all for no names; ValueError for unknown ones."""
    known = {section.name: section for section in SECTIONS}
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"no section {', '.join(unknown)}: there are {', '.join(known)}")
    return tuple(section for section in SECTIONS if not names or section.name in names)
