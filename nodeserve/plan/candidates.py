"""Layouts that could be planned: what fits the GPUs, in every shape whose passes are known, or
follow from those of one worker by formula.

A layout is of a kind: "mixed" has instances that do both phases and no others, "split" has phases
apart. Layouts that are both are reached from the best of each kind by moves, one instance at a
time (`neighbours`).
"""

import contextlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import gcd
from typing import NamedTuple

from nodeserve.errors import ConfigError
from nodeserve.layout import Group, Layout, Shape, parse_layout
from nodeserve.policy.profile import Family, Profile
from nodeserve.types import Role

MAX_BATCHED_TOKENS = 16_384
DEGREES, STAGES = (1, 2, 4, 8), (1, 2, 4)  # that are tried where only one worker was measured
MIXED_CHUNKS = (0.25, 1.0)  # times the profile's own: what mixed instances are tried with


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layout and the settings that are planned with it."""

    layout: str
    max_num_batched_tokens: int
    window_s: float | None = None  # as in DispatchOptions

    @property
    def kind(self) -> str:
        """mixed, or split."""
        roles = set(parse_layout(self.layout).roles)
        return "mixed" if roles == {Role.MIXED} else "split"


class Kind(NamedTuple):
    """A shape that instances may have."""

    shape: Shape
    profile: Profile  # of one rank
    num_gpus: int  # of an instance


def kinds_of(
    model: Profile | Family,
    num_gpus: int,
    eps: Sequence[int] = (1,),
    shapes: Collection[Shape] | None = None,
) -> list[Kind]:
    """Shapes that fit so many GPUs, small ones first; of `shapes` alone, if given. `eps` are the
    expert parallel degrees to try, where the model does not say its own. ConfigError if there is
    none."""
    ranks = model.ranks if isinstance(model, Family) else _shapes_of(model, num_gpus, eps)
    kinds = [
        Kind(replace(shape, ep=ep), profile, profile.num_gpus * ep)
        for shape, profile in ranks.items()
        for ep in (eps if shape.ep == 1 and _any_ep(model) else (shape.ep,))
        if profile.num_gpus * ep <= num_gpus
    ]
    if not kinds:
        least = min(
            profile.num_gpus * (min(eps) if shape.ep == 1 else shape.ep)
            for shape, profile in ranks.items()
        )
        raise ConfigError(f"{model.name} needs {least} GPUs or more, {num_gpus} given")
    chosen = [kind for kind in kinds if shapes is None or kind.shape in shapes]
    if not chosen:
        known = ", ".join(str(kind.shape) or "one worker" for kind in kinds)
        raise ConfigError(f"{model.name} has none of the shapes asked for: it has {known}")
    return sorted(chosen, key=lambda kind: (kind.num_gpus, kind.shape.pp))


def _any_ep(model: Profile | Family) -> bool:
    """Whether it describes a rank of however many."""
    return isinstance(model, Family) or not (model.anatomy and model.anatomy.num_experts)


def _shapes_of(model: Profile, num_gpus: int, eps: Sequence[int]) -> dict[Shape, Profile]:
    """One worker as it was measured, and what formulas make of it; of a sparse model also ranks
    that share its experts, of `eps` or, where that is 1 alone, of any degree."""
    found: dict[Shape, Profile] = {}
    anatomy = model.anatomy
    if anatomy is None:
        return {Shape(): model}
    if _any_ep(model):
        eps = (1,)
    elif tuple(eps) == (1,):
        eps = [degree for degree in DEGREES if degree <= anatomy.num_experts]
    for tp, pp, ep in product(DEGREES, STAGES, eps):
        shape = Shape(tp, pp, ep)
        if model.num_gpus * shape.num_workers > num_gpus:
            continue
        with contextlib.suppress(ConfigError):  # no room, or too few layers
            found[shape] = model.of(shape)
    return found


def by_formula(model: Profile | Family, layouts: Iterable[str]) -> list[Shape]:
    """The shapes in these layouts whose passes nobody measured."""
    shapes = {group.shape for layout in layouts for group in parse_layout(layout).groups}
    unmeasured = (shape for shape in shapes if model.of(shape).by_formula)
    return sorted(unmeasured, key=lambda shape: (shape.num_workers, shape.pp, shape.ep))


def gpus_of(layout: Layout, kinds: Iterable[Kind]) -> int:
    """GPUs that a layout takes."""
    sizes = {kind.shape: kind.num_gpus for kind in kinds}
    return sum(group.count * sizes[group.shape] for group in layout.groups)


def mixed_layouts(kinds: Iterable[Kind], num_gpus: int) -> Iterator[Layout]:
    """As many mixed instances of each shape as fit."""
    for kind in kinds:
        yield Layout((Group(num_gpus // kind.num_gpus, Role.MIXED, kind.shape),))


def split_layouts(kinds: Sequence[Kind], num_gpus: int) -> Iterator[Layout]:
    """Every pair of shapes and every number of prefill instances, the rest decodes. Not those that
    leave room for one more."""
    for prefill in kinds:
        for decode in kinds:
            for num_prefill in range(1, num_gpus // prefill.num_gpus + 1):
                rest = num_gpus - num_prefill * prefill.num_gpus
                num_decode = rest // decode.num_gpus
                left = rest - num_decode * decode.num_gpus
                if num_decode and left < prefill.num_gpus:
                    yield Layout(
                        (
                            Group(num_prefill, Role.PREFILL, prefill.shape),
                            Group(num_decode, Role.DECODE, decode.shape),
                        )
                    )


def all_candidates(
    kinds: Sequence[Kind],
    num_gpus: int,
    max_num_seqs: int,
    chunk: int | None = None,
    window_s: float | None = None,
) -> list[Candidate]:
    """Mixed and split layouts; the mixed ones with several sizes of a chunk, which decides how long
    a prompt holds up those that decode beside it, unless it is given."""
    budget = max(kind.profile.max_num_batched_tokens for kind in kinds)
    sizes = [chunk] if chunk else chunks(budget, MIXED_CHUNKS, max_num_seqs)
    mixed = [
        Candidate(str(layout), size, window_s)
        for layout in mixed_layouts(kinds, num_gpus)
        for size in sizes
    ]
    whole = chunk or max(budget, max_num_seqs)
    split = split_layouts(kinds, num_gpus)
    return mixed + [Candidate(str(layout), whole, window_s) for layout in split]


def chunks(budget: int, factors: Iterable[float], max_num_seqs: int) -> list[int]:
    """Budgets of a pass: these multiples, within what a server takes."""
    sizes = (
        min(max(round(budget * factor), max_num_seqs), MAX_BATCHED_TOKENS) for factor in factors
    )
    return list(dict.fromkeys(sizes))


def part_of(candidate: Candidate) -> tuple[Candidate, int]:
    """The smallest node of the same proportions that has two instances or more of each group, and
    how many of it make the candidate; itself, and 1, where there is none smaller."""
    groups = parse_layout(candidate.layout).groups
    number = gcd(*(group.count for group in groups))
    while number > 1 and min(group.count for group in groups) < 2 * number:
        number = next((less for less in range(number - 1, 1, -1) if not number % less), 1)
    part = Layout(tuple(replace(group, count=group.count // number) for group in groups))
    return replace(candidate, layout=str(part)), number


def neighbours(candidate: Candidate) -> list[Candidate]:
    """Layouts in which one instance has another role, or another phase one instance more, of
    groups that share a shape."""
    groups = parse_layout(candidate.layout).groups
    roles = (Role.PREFILL, Role.DECODE, Role.MIXED)
    found: dict[str, None] = {}
    for group in groups:
        for role in roles:
            if role is not group.role:
                moved = _moved(groups, group, role)
                if moved is not None:
                    found[str(moved)] = None
    return [replace(candidate, layout=layout) for layout in found]


def _moved(groups: tuple[Group, ...], source: Group, role: Role) -> Layout | None:
    """With one instance of `source` in this role; None if then a phase has nobody."""
    counts = {(group.role, group.shape): group.count for group in groups}
    counts[source.role, source.shape] -= 1
    counts[role, source.shape] = counts.get((role, source.shape), 0) + 1
    order = list(Role)
    left = sorted(
        (Group(count, *key) for key, count in counts.items() if count),
        key=lambda group: order.index(group.role),
    )
    has = {group.role for group in left}
    if Role.MIXED in has or {Role.PREFILL, Role.DECODE} <= has:
        return Layout(tuple(left))
    return None


def variations(
    candidate: Candidate, max_num_seqs: int, keep_chunk: bool = False, keep_window: bool = False
) -> list[Candidate]:
    """The same layout with other chunks, and without the window where there is one."""
    factors = () if keep_chunk else (0.5, 2.0, 4.0)
    sizes = chunks(candidate.max_num_batched_tokens, factors, max_num_seqs)
    tried = [
        replace(candidate, max_num_batched_tokens=size)
        for size in sizes
        if size != candidate.max_num_batched_tokens
    ]
    prefilling = [role for role in parse_layout(candidate.layout).roles if role is not Role.DECODE]
    if len(prefilling) > 1 and candidate.window_s is None and not keep_window:
        tried.append(replace(candidate, window_s=0.0))
    return tried
