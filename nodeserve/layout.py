"""Layouts: which instances a node runs, their roles and shapes, as one short word.

    layout = GROUP ("," GROUP)*        4p4d   1p1d   8m   2p:tp2,4d   1p:ep4,1d:ep4
    GROUP  = COUNT ROLE [":" SHAPE ("." SHAPE)*]
    ROLE   = p (prefill) | d (decode) | m (mixed)
    SHAPE  = tpN | ppN | epN

The comma may be left out after a group without a shape.
"""

import re
from dataclasses import dataclass

from nodeserve.errors import ConfigError
from nodeserve.types import Role

_ROLES = {"p": Role.PREFILL, "d": Role.DECODE, "m": Role.MIXED}
_LETTERS = {role: letter for letter, role in _ROLES.items()}
_GROUP = re.compile(r"(\d+)([a-z])((?::[^,]*)?)(,?)")
_SHAPE = re.compile(r"(tp|pp|ep)(\d+)")
_MAX_WORKERS = 1024


@dataclass(frozen=True, slots=True)
class Shape:
    """Parallelism of one instance: tensor, pipeline and expert degrees."""

    tp: int = 1
    pp: int = 1
    ep: int = 1

    @property
    def num_workers(self) -> int:
        return self.tp * self.pp * self.ep

    @property
    def team_size(self) -> int:
        """Workers that compute a DP rank's steps together; the first of them leads."""
        return self.tp * self.pp

    def __str__(self) -> str:
        degrees = (("tp", self.tp), ("pp", self.pp), ("ep", self.ep))
        return ".".join(f"{name}{degree}" for name, degree in degrees if degree > 1)


@dataclass(frozen=True, slots=True)
class Group:
    """`count` instances of one role and shape."""

    count: int
    role: Role
    shape: Shape = Shape()

    @property
    def num_workers(self) -> int:
        return self.count * self.shape.num_workers

    def __str__(self) -> str:
        shape = str(self.shape)
        return f"{self.count}{_LETTERS[self.role]}" + (f":{shape}" if shape else "")


@dataclass(frozen=True, slots=True)
class Layout:
    """All groups of a node, in the order given."""

    groups: tuple[Group, ...]

    @property
    def num_workers(self) -> int:
        return sum(group.num_workers for group in self.groups)

    @property
    def instances(self) -> tuple[Group, ...]:
        """The group of each instance, in order."""
        return tuple(group for group in self.groups for _ in range(group.count))

    @property
    def roles(self) -> tuple[Role, ...]:
        """The role of each instance, in order."""
        return tuple(group.role for group in self.instances)

    def __str__(self) -> str:
        parts = [str(group) for group in self.groups]
        plain = all(":" not in part for part in parts)
        return ("" if plain else ",").join(parts)


def parse_layout(text: str) -> Layout:
    """Read a layout; ConfigError says which part is wrong and what would be right."""
    if not text:
        raise ConfigError("the layout is empty: give one such as 1p1d, 4p4d or 8m")
    groups, position = [], 0
    while position < len(text):
        match = _GROUP.match(text, position)
        if match is None:
            raise ConfigError(
                f"layout {text!r}: cannot read {text[position:]!r}; a group is COUNT ROLE"
                " [:SHAPE], for example 2p, 4d or 2p:tp2"
            )
        groups.append(_group(text, match))
        position = match.end()
        if match.group(4) and position == len(text):
            raise ConfigError(f"layout {text!r}: a group is missing after the last comma")
    layout = Layout(tuple(groups))
    _check_roles(text, layout)
    return layout


def _group(text: str, match: re.Match[str]) -> Group:
    count, letter, shapes = int(match.group(1)), match.group(2), match.group(3)
    if letter not in _ROLES:
        raise ConfigError(
            f"layout {text!r}: unknown role {letter!r}; use p (prefill), d (decode) or m (mixed)"
        )
    if not 1 <= count <= _MAX_WORKERS:
        raise ConfigError(f"layout {text!r}: a count must be from 1 to {_MAX_WORKERS}, got {count}")
    return Group(count, _ROLES[letter], _shape(text, shapes[1:]) if shapes else Shape())


def _shape(text: str, shapes: str) -> Shape:
    degrees: dict[str, int] = {}
    for part in shapes.split("."):
        match = _SHAPE.fullmatch(part)
        if match is None:
            raise ConfigError(
                f"layout {text!r}: unknown shape {part!r}; use tpN, ppN or epN, joined by dots,"
                " and a comma before the next group"
            )
        name, degree = match.group(1), int(match.group(2))
        if name in degrees:
            raise ConfigError(f"layout {text!r}: {name} is given twice in one group")
        if not 1 <= degree <= _MAX_WORKERS:
            raise ConfigError(f"layout {text!r}: {part} must be from 1 to {_MAX_WORKERS}")
        degrees[name] = degree
    return Shape(**degrees)


def _check_roles(text: str, layout: Layout) -> None:
    roles = set(layout.roles)
    if layout.num_workers > _MAX_WORKERS:
        raise ConfigError(f"layout {text!r}: {layout.num_workers} workers; at most {_MAX_WORKERS}")
    if Role.MIXED in roles:
        return
    for needed, letter in ((Role.PREFILL, "p"), (Role.DECODE, "d")):
        if needed not in roles:
            raise ConfigError(
                f"layout {text!r} has nobody for {needed.value}: add a group such as 1{letter},"
                " or use m (mixed) instances"
            )


def check_devices(layout: Layout, num_devices: int) -> None:
    """The workers must be exactly as many as the devices given."""
    difference = layout.num_workers - num_devices
    if difference > 0:
        raise ConfigError(
            f"layout {layout} needs {layout.num_workers} GPUs, {num_devices} given:"
            f" {difference} missing"
        )
    if difference < 0:
        raise ConfigError(
            f"layout {layout} needs {layout.num_workers} GPUs, {num_devices} given:"
            f" {-difference} left over"
        )


def parse_gpus(text: str) -> tuple[int, ...]:
    """Read device numbers: "0-7", "0,2,5", "0,0" (two workers on one GPU)."""
    gpus: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None:
            raise ConfigError(f"--gpus {text!r}: cannot read {part!r}; use 0-7 or 0,2,5")
        first = int(match.group(1))
        last = int(match.group(2) or first)
        if last < first or last - first >= _MAX_WORKERS:
            raise ConfigError(f"--gpus {text!r}: {part!r} is not a rising range")
        gpus.extend(range(first, last + 1))
    return tuple(gpus)
