"""From a model and a machine to a profile: measure, fit, check on what was held out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

from nodeserve.checkpoint import Checkpoint
from nodeserve.config import EngineConfig, ModelConfig
from nodeserve.coordinator.needs import DTYPE_BYTES, dtype_of
from nodeserve.coordinator.server import OnEvent
from nodeserve.gpus import Gpus
from nodeserve.plan.fit import Errors, errors_of, fit_cost, spread_of
from nodeserve.policy.profile import Profile
from nodeserve.policy.sizes import Anatomy, anatomy_of
from nodeserve.profiling.experiments import Measured, Tell, measure_handoffs, measure_passes
from nodeserve.profiling.node import Node, with_node

# Between two processes with a core each, in memory: half of what an all-reduce of one row takes
# with two, by `make bench-step` (docs/instances.md).
CPU_HOP_S = 1.2e-6
UNMEASURED_BYTES_PER_S = 1e9  # with one worker there is no handoff to time


@dataclass(frozen=True, slots=True)
class Result:
    """A profile and how well it predicts what it was not made from; None: nothing was held out."""

    profile: Profile
    prefill: Errors | None
    decode: Errors | None
    handoff: Errors | None
    num_passes: int

    def noted(self) -> dict[str, object]:
        """The errors, for the profile's file."""
        return {
            name: one and one._asdict()
            for name, one in (
                ("prefill", self.prefill),
                ("decode", self.decode),
                ("handoff", self.handoff),
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
    """Run `num_workers` mixed workers, then a pair with a handoff between them if there are two."""
    mixed = replace(config, layout=f"{num_workers}m")

    async def passes(node: Node) -> tuple[Measured, Profile]:
        measured = await measure_passes(node, num_workers, tell)
        return measured, _profile(node, name, measured)

    measured, profile = with_node(mixed, checkpoint, gpus, on_event, passes)
    handoff = None
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
    return _result(profile, measured, handoff)


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


def _result(profile: Profile, measured: Measured, handoff: Errors | None) -> Result:
    def errors(prefill: bool) -> Errors | None:
        chosen = [one for one in measured.held_out if bool(one.work.prefill_tokens) is prefill]
        return errors_of(chosen, profile.cost, measured.gap_s)

    return Result(
        profile,
        errors(prefill=True),
        errors(prefill=False),
        handoff,
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
