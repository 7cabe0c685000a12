"""From a model and a machine to a profile: measure, fit, check on what was held out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

from nodeserve.checkpoint import Checkpoint
from nodeserve.config import EngineConfig, ModelConfig
from nodeserve.coordinator.needs import DTYPE_BYTES, dtype_of
from nodeserve.coordinator.server import OnEvent
from nodeserve.errors import ConfigError, ModelError
from nodeserve.gpus import Gpus
from nodeserve.plan.fit import Errors, Timed, errors_of, fit_cost, slowdown_of, spread_of
from nodeserve.plan.fit_team import PAIR, fit_team
from nodeserve.policy.profile import Profile
from nodeserve.policy.sizes import Anatomy, anatomy_of
from nodeserve.profiling.experiments import (
    Measured,
    Tell,
    measure_handoffs,
    measure_passes,
    measure_service,
)
from nodeserve.profiling.node import Node, with_node
from nodeserve.shards import check_fits

# Between two processes with a core each, in memory: half of what an all-reduce of one row takes
# with two, by `make bench-step` (docs/instances.md), where no team is measured.
CPU_HOP_S = 1.2e-6
TEAM_OFF = 0.25  # on average: less than that decides between layouts
TEAM_EVERY = 3  # experiments: two numbers are wanted
UNMEASURED_BYTES_PER_S = 1e9  # with one worker there is no handoff to time


@dataclass(frozen=True, slots=True)
class Result:
    """A profile and how well it predicts what it was not made from; None: nothing was held out.
    The errors are of passes that nothing held up. In service passes take `slowdown` times as long,
    by which the profile's times are multiplied."""

    profile: Profile
    slowdown: float
    prefill: Errors | None
    decode: Errors | None
    handoff: Errors | None
    team: Errors | None  # passes of two CPU workers together
    num_passes: int

    def noted(self) -> dict[str, object]:
        """The errors, for the profile's file."""
        return {
            name: one and one._asdict()
            for name, one in (
                ("prefill", self.prefill),
                ("decode", self.decode),
                ("handoff", self.handoff),
                ("team", self.team),
            )
        }


def measure_profile(
    config: EngineConfig,
    checkpoint: Checkpoint,
    gpus: Gpus,
    num_workers: int,
    name: str,
    on_event: OnEvent,
    tell: Tell,
) -> Result:
    """Run `num_workers` mixed workers, then a pair with a handoff between them if there are two,
    then teams of two."""
    mixed = replace(config, layout=f"{num_workers}m")

    async def passes(node: Node) -> tuple[Measured, list[Timed], Profile]:
        measured = await measure_passes(node, num_workers, tell)
        service = await measure_service(node, num_workers, tell)
        return measured, service, _profile(node, name, measured)

    measured, service, profile = with_node(mixed, checkpoint, gpus, on_event, passes)
    handoff, team = None, None
    if num_workers > 1:
        pair = replace(config, layout=f"1p{num_workers - 1}d")
        pulls, held = with_node(
            pair, checkpoint, gpus, on_event, lambda node: measure_handoffs(node, tell)
        )
        rate = rate_of(pulls)
        profile = replace(
            profile, handoff_bytes_per_s=rate, anatomy=anatomy_here(checkpoint.config, config, gpus)
        )
        handoff = handoff_errors(held, rate)
    if makes_teams(checkpoint.config, profile, num_workers):
        together = with_node(
            replace(config, layout=f"{num_workers // 2}m:{PAIR}"),
            checkpoint,
            gpus,
            on_event,
            lambda node: measure_passes(node, num_workers // 2, tell, every=TEAM_EVERY),
        )
        profile, team = with_team(profile, together)
    return _result(profile, measured, service, handoff, team)


def with_team(profile: Profile, together: Measured) -> tuple[Profile, Errors | None]:
    """With what workers of a team tell each other, and how far off that is; where it is too far
    off the profile stays as it was, so that nobody plans teams by it."""
    anatomy = fit_team(profile, together.fit, together.gap_s)
    fitted = replace(profile, anatomy=anatomy)
    errors = errors_of(together.held_out, fitted.of(PAIR).cost, together.gap_s)
    return fitted if errors and errors.mean <= TEAM_OFF else profile, errors


def makes_teams(model: ModelConfig, profile: Profile, num_workers: int) -> bool:
    """Whether what CPU workers tell each other can be measured with as many cores for each as they
    had alone. GPUs have their links, and tables."""
    if num_workers % 2 or profile.anatomy is None or not profile.anatomy.fixed_pool:
        return False
    try:
        check_fits(model, PAIR)
        profile.of(PAIR)
    except (ModelError, ConfigError):
        return False
    return True


def _profile(node: Node, name: str, measured: Measured) -> Profile:
    plan = node.plan
    cost = fit_cost(measured.fit, measured.gap_s)
    devices = plan.config.device
    return Profile(
        name=name,
        source=f"measured by `nodeserve profile`: {plan.config.served_model_name} on {devices},"
        f" {len(plan.places)} workers at once, {node.kernels}",
        cost=cost,
        noise=round(spread_of(measured.fit, cost, measured.gap_s), 4),
        num_kv_tokens=node.num_kv_tokens,
        kv_bytes_per_token=node.block_bytes // plan.config.block_size,
        handoff_bytes_per_s=UNMEASURED_BYTES_PER_S,
        max_num_batched_tokens=plan.max_num_batched_tokens,
        max_num_seqs=plan.max_num_seqs,
        max_model_len=plan.max_model_len,
        transit_s=measured.transit_s,
    )


def anatomy_here(model: ModelConfig, config: EngineConfig, gpus: Gpus) -> Anatomy | None:
    """Of the model on these devices, between which the rate of copies is known; None for models
    that run on one worker an instance."""
    if model.foreign is not None:
        return None
    dtype_bytes = DTYPE_BYTES[dtype_of(config)]
    value_bytes = 1 if model.fp8_block else dtype_bytes
    if config.device != "cpu" and gpus.usable:
        return anatomy_of(model, value_bytes, dtype_bytes)
    return anatomy_of(model, value_bytes, 4, CPU_HOP_S, fixed_pool=True)  # sums are of float32


def _result(
    profile: Profile,
    measured: Measured,
    service: Sequence[Timed],
    handoff: Errors | None,
    team: Errors | None,
) -> Result:
    def errors(prefill: bool) -> Errors | None:
        chosen = [one for one in measured.held_out if bool(one.work.prefill_tokens) is prefill]
        return errors_of(chosen, profile.cost, measured.gap_s)

    slowdown = slowdown_of(service, profile.cost, measured.gap_s)
    return Result(
        replace(profile, cost=profile.cost.times(slowdown)),
        slowdown,
        errors(prefill=True),
        errors(prefill=False),
        handoff,
        team,
        len(measured.fit) + len(measured.held_out),
    )


Pulls = Sequence[tuple[int, float]]  # bytes and seconds of copies


def rate_of(pulls: Pulls) -> float:
    """Bytes a second, with errors as shares of what a copy of each size took."""
    shares = [num_bytes / seconds for num_bytes, seconds in _usual(pulls).items() if seconds > 0.0]
    if not shares:
        return UNMEASURED_BYTES_PER_S
    return sum(share * share for share in shares) / sum(shares)


def handoff_errors(pulls: Pulls, rate: float) -> Errors | None:
    """Of copies of the same size together."""
    off = [abs(size / rate / seconds - 1.0) for size, seconds in _usual(pulls).items()]
    return Errors(fmean(off), max(off), len(off)) if off else None


def _usual(pulls: Pulls) -> dict[int, float]:
    """Median seconds by size: one copy that was held up says nothing."""
    sizes: dict[int, list[float]] = {}
    for num_bytes, seconds in pulls:
        sizes.setdefault(num_bytes, []).append(seconds)
    return {num_bytes: median(times) for num_bytes, times in sizes.items()}
