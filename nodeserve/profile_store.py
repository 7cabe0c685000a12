"""Profiles by name: those that come with the package, and those that were measured and stored.

A stored profile is a JSON file, in $NODESERVE_PROFILES, else in nodeserve/profiles below
$XDG_CONFIG_HOME or ~/.config; a name with a slash or the suffix .json is a file's own path.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any

from nodeserve.errors import ConfigError
from nodeserve.layout import Shape
from nodeserve.policy.cost import StepCost
from nodeserve.policy.profile import Family, Profile
from nodeserve.policy.profiles import FAMILIES, PROFILES, find_profile
from nodeserve.policy.sizes import Anatomy
from nodeserve.types import brief, shown

FORMAT = 1
MAX_NAME = 100
_PARTS = ("large", "floor")  # of a cost: costs themselves
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_COUNTS = (
    *("num_kv_tokens", "kv_bytes_per_token", "max_num_batched_tokens", "max_num_seqs"),
    *("max_model_len", "num_stages", "num_gpus"),
)


def folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where stored profiles are; it may not exist yet."""
    if named := environ.get("NODESERVE_PROFILES"):
        return Path(named).expanduser()
    config = environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(config).expanduser() / "nodeserve" / "profiles"


def path_of(name: str) -> Path:
    """The file that a stored profile of this name has, or would have, as an absolute path."""
    if "/" in name or name.endswith(".json"):
        return Path(name).expanduser().absolute()
    return (folder() / f"{name}.json").absolute()


def stored_names() -> list[str]:
    """Those in the folder, sorted."""
    return sorted(path.stem for path in folder().glob("*.json"))


def profile_or_family(name: str) -> Profile | Family:
    """What has this name, stored or in the package; ConfigError lists what there is."""
    if name in PROFILES or name in FAMILIES:
        return find_profile(name)
    path = path_of(name)
    if not path.exists():
        known = dict.fromkeys([*PROFILES, *FAMILIES, *stored_names()])
        raise ConfigError(
            f"no profile {name!r}: use one of {', '.join(known)}, or measure one with `nodeserve"
            " profile`"
        )
    return read(path)


def shaped_profile(name: str, shape: Shape) -> Profile:
    """Of a rank of an instance of this shape; ConfigError where nothing of this name has it."""
    return profile_or_family(name).of(shape)


def read(path: Path) -> Profile:
    """ConfigError says what is wrong with the file."""
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"profile {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(
            f"profile {path} is not one that `nodeserve profile` wrote: {brief(error)}"
        ) from None


def measured(name: str) -> dict[str, Any]:
    """What was noted beside a stored profile: on what it was measured; empty for others."""
    path = path_of(name)
    if name in PROFILES or name in FAMILIES or not path.exists():
        return {}
    read(path)
    noted = json.loads(path.read_text(encoding="utf-8")).get("measured", {})
    return noted if isinstance(noted, dict) else {}


def write(profile: Profile, measured: Mapping[str, Any], path: Path | None = None) -> Path:
    """Store it under its name, or at `path`; the file's path. ConfigError if that cannot be."""
    check_name(profile.name)
    target = path or path_of(profile.name)
    words = {"format": FORMAT, **to_json(profile), "measured": dict(measured)}
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(words, indent=1) + "\n", encoding="utf-8")
        partial.replace(target)  # readers see all of it or nothing
    except OSError as error:
        raise ConfigError(f"cannot write profile {target}: {error.strerror}") from None
    return target


def check_name(name: str) -> None:
    """ConfigError unless a stored profile may have it."""
    if not _NAME.fullmatch(name) or len(name) > MAX_NAME or name.endswith(".json"):
        raise ConfigError(
            f"profile name {name!r}: use small letters, digits, dots and dashes, such as my-cpu"
        )
    if name in PROFILES or name in FAMILIES:
        raise ConfigError(f"profile name {name!r} comes with nodeserve: choose another with --name")


def name_for(model: str, device: str) -> str:
    """The name that a measured profile gets unless it is given one."""
    plain = re.sub(r"[^a-z0-9.]+", "-", f"{model}-{device}".lower()).strip("-.")
    return plain[:MAX_NAME]


def to_json(profile: Profile) -> dict[str, Any]:
    """Plain values."""
    return asdict(profile)


def from_json(values: Mapping[str, Any]) -> Profile:
    """The reverse; ValueError, TypeError or KeyError where that is not what it is."""
    if not isinstance(values, Mapping) or not isinstance(values.get("cost"), Mapping):
        raise TypeError("there is no cost in it")
    if values.get("format", FORMAT) != FORMAT:
        raise ValueError(f"format {values['format']!r}, this nodeserve reads {FORMAT}")
    known = {one.name for one in fields(Profile)} - {"by_formula"}  # a stored one was measured
    chosen = {name: value for name, value in values.items() if name in known}
    anatomy = values.get("anatomy")
    made: Any = {"cost": _cost(values["cost"]), "anatomy": anatomy and _anatomy(anatomy)}
    profile = Profile(**{**chosen, **made})
    for name in _COUNTS:
        count = getattr(profile, name)
        if type(count) is not int or count < 1:
            raise ValueError(f"{name} is {count!r}, not a number from 1")
    if not 0.0 <= profile.noise <= 1.0 or not 0.0 < profile.handoff_bytes_per_s < math.inf:
        raise ValueError("noise lies from 0 to 1, and handoff_bytes_per_s is above 0")
    if not 0.0 <= profile.transit_s < math.inf:
        raise ValueError(f"transit_s is {profile.transit_s!r}, not a number from 0")
    return profile


def _anatomy(values: Mapping[str, Any]) -> Anatomy:
    if not isinstance(values, Mapping):
        raise TypeError(f"an anatomy is {shown(values)}")
    anatomy = Anatomy(**values)
    for one in fields(anatomy):
        number, least = getattr(anatomy, one.name), one.default is MISSING
        if not least <= number < math.inf:
            raise ValueError(f"{one.name} is {number!r}, not a number from {least:d}")
    return anatomy


def _cost(values: Mapping[str, Any]) -> StepCost:
    if not isinstance(values, Mapping):
        raise TypeError(f"a cost is {shown(values)}")
    parts = {name: values[name] for name in _PARTS if values.get(name) is not None}
    cost = StepCost(**{**values, **dict.fromkeys(_PARTS)})
    for one in fields(cost):
        number = getattr(cost, one.name)
        if one.name not in _PARTS and not 0.0 <= number < math.inf:
            raise ValueError(f"{one.name} is {number!r}, not a number from 0")
    nested: Any = {name: _cost(part) for name, part in parts.items()}
    return replace(cost, **nested)
