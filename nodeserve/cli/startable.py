"""Of the shapes that a profile knows those that `nodeserve start` can start, with a model and here.

What refuses a shape at a start is asked here before anything is planned with it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from nodeserve.config import EngineConfig, ModelConfig
from nodeserve.coordinator.copies import choose_counts
from nodeserve.coordinator.needs import needs_of
from nodeserve.coordinator.room import check_kv_memory
from nodeserve.errors import ConfigError, ModelError
from nodeserve.gpus import Gpus
from nodeserve.layout import Group, Layout, Shape, parse_gpus
from nodeserve.plan.candidates import Kind, kinds_of
from nodeserve.policy.profile import Family, Profile
from nodeserve.shards import check_fits
from nodeserve.types import Role

Check = Callable[[Kind], None]  # ConfigError or ModelError: no instance can have this shape


class Startable(NamedTuple):
    """`refused`: why not the others, in words, with the shapes of which that is true."""

    shapes: tuple[Shape, ...]
    refused: dict[str, list[Shape]]

    def notes(self) -> list[str]:
        """What a person should know of the shapes that are left out, a line for each reason."""
        return [
            f"not planned with {', '.join(map(named, shapes))}: {why}"
            for why, shapes in self.refused.items()
        ]


def startable(
    model: Profile | Family, num_gpus: int, eps: Sequence[int], checks: Sequence[Check]
) -> Startable:
    """Those of so many GPUs; ConfigError says why there is none."""
    found: list[Shape] = []
    refused: dict[str, list[Shape]] = {}
    for kind in kinds_of(model, num_gpus, eps):
        try:
            for check in checks:
                check(kind)
            found.append(kind.shape)
        except (ConfigError, ModelError) as problem:
            refused.setdefault(str(problem), []).append(kind.shape)
    here = Startable(tuple(found), refused)
    if not found:
        words = "; ".join(here.notes())
        raise ConfigError(f"no shape of profile {model.name} can be started: {words}")
    return here


def named(shape: Shape) -> str:
    return str(shape) or "one worker"


# ---- checks


def whole_worker(kind: Kind) -> None:
    """A profile of several GPUs that does not say what they are to each other starts nowhere."""
    if kind.num_gpus != kind.shape.num_workers:
        raise ConfigError(
            f"the profile is of {kind.num_gpus} GPUs as one rank and does not say of which shape"
        )


def fits(model: ModelConfig) -> Check:
    """Its layers, heads, columns and experts can be shared out."""
    return lambda kind: check_fits(model, kind.shape)


def holds(context: int, block_size: int) -> Check:
    """A request of this context has room in the pages of a rank, as profiled."""

    def check(kind: Kind) -> None:
        if kind.profile.num_kv_tokens < context + block_size:
            raise ConfigError(
                f"a rank has no room for a request of {context} tokens: lower --max-model-len, or"
                " raise --kv-memory"
            )

    return check


def knows_teams(profile: Profile | Family) -> Check:
    """What CPU workers of a team tell each other takes as long as was measured; nobody foretells
    it."""
    anatomy = profile.anatomy if isinstance(profile, Profile) else None

    def check(kind: Kind) -> None:
        if kind.shape != Shape() and anatomy and anatomy.fixed_pool and not anatomy.sum_bytes_per_s:
            raise ConfigError(
                "the profile does not say what CPU workers of one instance tell each other:"
                " measure it again, with `nodeserve profile --workers 2` or more"
            )

    return check


def on_gpus(config: EngineConfig, model: ModelConfig, context: int, gpus: Gpus) -> Check:
    """What does not fit these GPUs; and teams on one GPU, whose ways through the host nobody
    measured."""
    asked = parse_gpus(config.gpus) if config.gpus else tuple(gpu.index for gpu in gpus.found)
    free = min((gpu.free_bytes for gpu in gpus.found if gpu.index in asked), default=0)

    def check(kind: Kind) -> None:
        needs = needs_of(config, model, kind.shape, context)
        if needs.weight_bytes + needs.kv_bytes > free:
            raise ConfigError(
                f"weights and one sequence do not fit a GPU of which {free} bytes are free"
            )
        if kind.shape != Shape() and len(set(asked)) < len(asked):
            raise ConfigError("what workers on one GPU tell each other goes by way of the host")

    return check


def starts(config: EngineConfig, model: ModelConfig, context: int) -> Check:
    """What a start of real workers with these settings refuses anywhere."""

    def check(kind: Kind) -> None:
        shape = kind.shape
        check_kv_memory(config.kv_memory, needs_of(config, model, shape, context).kv_bytes)
        choose_counts(config, model, Layout((Group(1, Role.MIXED, shape),)))

    return check
