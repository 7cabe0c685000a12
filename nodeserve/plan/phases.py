"""What one phase of a split layout can serve: measured once, for all layouts that share it.

A layout with phases apart serves what its slower phase serves. Where the other could serve far more
on paper, a run shows what the slower one can do, and any layout with the same instances for it, or
fewer of them, serves no more. So a search need not run every pair of shapes in every proportion:
one that is limited by its decodes wants as many instances for them as fit.
"""

from collections.abc import Callable, Iterable

from nodeserve.layout import Group, parse_layout
from nodeserve.plan.bounds import Sides
from nodeserve.plan.candidates import Candidate, part_of
from nodeserve.types import Role

FAR_MORE = 1.2  # of one phase's bound in the other's


class PhaseLimits:
    """By the instances of a phase, the most requests a second that a run showed them to serve.
    `sides_of` says on paper what each phase of a layout can."""

    def __init__(self, sides_of: Callable[[Candidate], Sides]) -> None:
        self._sides_of = sides_of
        self._most: dict[Group, float] = {}

    def note(self, candidate: Candidate, served: float) -> None:
        """It serves so many, or less."""
        slower = self._slower(candidate)
        if slower is not None:
            self._most[slower] = max(self._most.get(slower, 0.0), served)

    def allow(self, candidate: Candidate, rate: float) -> bool:
        """Whether it may serve more than this, for all that runs of others say."""
        return not any(
            most <= rate and _has(candidate, known) for known, most in self._most.items()
        )

    def apart(self, candidates: Iterable[Candidate], number: int) -> list[Candidate]:
        """The first so many of which none may be settled by what a run of another will show."""
        chosen: list[Candidate] = []
        awaited: list[Group] = []
        for candidate in candidates:
            if len(chosen) == number:
                break
            if not any(_has(candidate, slower) for slower in awaited):
                chosen.append(candidate)
                slower = self._slower(candidate)
                awaited += [slower] if slower else []
        return chosen

    def _slower(self, candidate: Candidate) -> Group | None:
        """The instances of the phase that a run of it measures. None where both are about as fast,
        where one is not of instances that do it alone, and of what is run in part: the whole serves
        more than so many of its parts."""
        prefill, decode = _groups(candidate.layout)
        if prefill is None or decode is None or part_of(candidate)[1] > 1:
            return None
        sides = self._sides_of(candidate)
        if sides.prefill * FAR_MORE <= sides.decode:
            return prefill
        return decode if sides.decode * FAR_MORE <= sides.prefill else None


def _has(candidate: Candidate, known: Group) -> bool:
    """Whether a phase is done by these instances, or by fewer of them."""
    return any(
        one is not None
        and (one.role, one.shape) == (known.role, known.shape)
        and one.count <= known.count
        for one in _groups(candidate.layout)
    )


def _groups(layout: str) -> tuple[Group | None, Group | None]:
    """The instances that prefill and those that decode, of a layout with one group of each."""
    groups = {group.role: group for group in parse_layout(layout).groups}
    if set(groups) != {Role.PREFILL, Role.DECODE}:
        return None, None
    return groups[Role.PREFILL], groups[Role.DECODE]
