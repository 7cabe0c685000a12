"""What simulated passes cost and devices hold: for one rank, and for a model in many shapes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random

from nodeserve.errors import ConfigError
from nodeserve.layout import Shape
from nodeserve.policy.cost import StepCost


@dataclass(frozen=True, slots=True)
class Profile:
    """One rank's device with one model. `source` says where the numbers are from.

    With pipeline stages, `cost` is of a pass through all of them; it occupies each for an equal
    share of its time. Tokens, and bytes a second, are of all GPUs of the rank together.
    """

    name: str
    source: str
    cost: StepCost
    noise: float  # standard deviation of a pass's duration, as a share of it
    num_kv_tokens: int  # that a rank's memory holds
    kv_bytes_per_token: int
    handoff_bytes_per_s: float
    max_num_batched_tokens: int  # default prefill chunk of a rank
    max_num_seqs: int
    max_model_len: int
    num_stages: int = 1
    num_gpus: int = 1
    transit_s: float = 0.0025  # of a message from the coordinator to a worker, or back


@dataclass(frozen=True, slots=True)
class Family:
    """One model on one kind of GPU, in every shape whose passes are known."""

    name: str
    source: str
    shapes: Mapping[tuple[int, int], Profile]  # by tensor and pipeline parallel degree
    # Of a rank of an expert-parallel instance, by its number of ranks, where that matters: what the
    # experts leave of a rank's memory, what their exchange takes.
    spread: Mapping[int, Profile] = field(default_factory=dict)

    def of(self, shape: Shape) -> Profile:
        """ConfigError names the shapes there are; others do not hold the model, or nobody measured
        them. The ranks of an expert parallel instance are such shapes each, unless the family
        knows them by their number."""
        if self.spread:
            return self._of_spread(shape)
        try:
            return self.shapes[shape.tp, shape.pp]
        except KeyError:
            known = ", ".join(f"tp{tp}.pp{pp}" for tp, pp in self.shapes)
            raise ConfigError(
                f"profile {self.name} has no tp{shape.tp}.pp{shape.pp}: use one of {known}"
            ) from None

    def _of_spread(self, shape: Shape) -> Profile:
        if (shape.tp, shape.pp) == (1, 1) and shape.ep in self.spread:
            return self.spread[shape.ep]
        known = ", ".join(f"ep{ep}" for ep in self.spread)
        raise ConfigError(f"profile {self.name} has no {shape}: use one of {known}")


LEAST_FACTOR = 0.5


def pass_factor(noise: float, seed: int, instance: int, number: int) -> float:
    """What a pass's expected duration is multiplied by: normal around 1 with this deviation, the
    same for the same seed, instance and pass number."""
    if not noise:
        return 1.0
    return max(LEAST_FACTOR, Random(f"{seed} {instance} {number}").gauss(1.0, noise))
