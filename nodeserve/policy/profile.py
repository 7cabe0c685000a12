"""What simulated passes cost and devices hold: for one rank, and for a model in many shapes."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from random import Random

from nodeserve.errors import ConfigError
from nodeserve.layout import Shape
from nodeserve.policy.cost import StepCost
from nodeserve.policy.shapes import Alone
from nodeserve.policy.sizes import Anatomy


@dataclass(frozen=True, slots=True)
class Profile:
    """One rank's device with one model. `source` says where the numbers are from.

    With pipeline stages, `cost` is of a pass through all of them; it occupies each for an equal
    share of its time. Tokens, and bytes a second, are of all GPUs of the rank together, bytes of a
    token those that all of them keep of it. A profile of one GPU with an `anatomy` can be asked
    about shapes that nobody measured (`of`).
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
    anatomy: Anatomy | None = None  # None: it is one whole rank, whatever that is made of
    by_formula: str = ""  # the shape, where nobody measured it

    @property
    def attention_weight(self) -> float:
        """What a pair of tokens in attention is worth, in tokens, for chunks that stages work on
        side by side (chunks.py); 0 without stages, or where a fit has it below 0."""
        cost = self.cost
        if self.num_stages == 1 or not cost.token_s:
            return 0.0
        return max(0.0, cost.attention_s / cost.token_s)

    def worker_kv_bytes(self, shape: Shape) -> int:
        """Bytes of a token in the pages of each worker, where this is a rank of that shape."""
        return -(-self.kv_bytes_per_token // shape.team_size)

    def within(self, context: int, kv_memory: int | None, team_size: int = 1) -> "Profile":
        """With requests of so many tokens at most, and in each of a rank's workers so many bytes of
        pages; None: as many as there are."""
        shorter = replace(self, max_model_len=context)
        if kv_memory is None:
            return shorter
        num_tokens = kv_memory * team_size // self.kv_bytes_per_token
        anatomy = self.anatomy and replace(self.anatomy, fixed_pool=True)
        return replace(shorter, num_kv_tokens=num_tokens, anatomy=anatomy)

    def of(self, shape: Shape) -> "Profile":
        """Of a rank of an instance of this shape, by the formulas of shapes.py: of one worker, or
        of ranks without experts, that is this. ConfigError where the formulas know too little, or
        where a worker has no room."""
        anatomy = self.anatomy
        if shape.team_size == 1 and (shape.ep == 1 or not (anatomy and anatomy.num_experts)):
            return self
        if anatomy is None:
            raise ConfigError(
                f"profile {self.name} describes a whole rank, whatever it is made of, and says"
                f" nothing of {shape}: give ranks of an instance as epN, for example 4p:ep8,1d:ep8,"
                " or measure a profile with `nodeserve profile`"
            )
        alone = Alone(
            anatomy,
            self.cost,
            self.num_kv_tokens,
            self.kv_bytes_per_token,
            self.handoff_bytes_per_s,
        )
        size, num_tokens = shape.team_size, alone.num_tokens_in(shape)
        if shape.pp > anatomy.num_layers:
            raise ConfigError(
                f"profile {self.name}: {shape} cuts {anatomy.num_layers} layers: use"
                f" pp{anatomy.num_layers} or less"
            )
        if num_tokens < self.max_model_len:
            raise ConfigError(
                f"profile {self.name}: in {shape} no worker has room for a request of"
                f" {self.max_model_len} tokens beside its weights"
            )
        return replace(
            self,
            source=f"{self.source}; {shape} by formula, not measured",
            by_formula=str(shape),
            cost=alone.cost_in(shape),
            num_kv_tokens=num_tokens,
            kv_bytes_per_token=round(size * alone.worker_kv_bytes(shape)),
            handoff_bytes_per_s=size * self.handoff_bytes_per_s,
            num_stages=shape.pp,
            num_gpus=size * self.num_gpus,
            anatomy=None,
        )


@dataclass(frozen=True, slots=True)
class Family:
    """One model on one kind of GPU, in every shape whose passes are known."""

    name: str
    source: str
    shapes: Mapping[tuple[int, int], Profile]  # by tensor and pipeline parallel degree
    # Of a rank of an expert-parallel instance, by its number of ranks, where that matters: what the
    # experts leave of a rank's memory, what their exchange takes.
    spread: Mapping[int, Profile] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[Shape, Profile]:
        """The profiles by shape; of spread ones the number of ranks is part of it."""
        plain = {Shape(tp, pp): profile for (tp, pp), profile in self.shapes.items()}
        return plain | {Shape(ep=ep): profile for ep, profile in self.spread.items()}

    def within(self, context: int, kv_memory: int | None) -> "Family":
        """Of requests of so many tokens at most, see Profile."""
        shapes = {
            (tp, pp): one.within(context, kv_memory, tp * pp)
            for (tp, pp), one in self.shapes.items()
        }
        spread = {ep: one.within(context, kv_memory) for ep, one in self.spread.items()}
        return replace(self, shapes=shapes, spread=spread)

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
        stated = str(shape) or "shape of one rank"
        raise ConfigError(f"profile {self.name} has no {stated}: use one of {known}")


LEAST_FACTOR = 0.5


def pass_factor(noise: float, seed: int, instance: int, number: int) -> float:
    """What a pass's expected duration is multiplied by: normal around 1 with this deviation, the
    same for the same seed, instance and pass number."""
    if not noise:
        return 1.0
    return max(LEAST_FACTOR, Random(f"{seed} {instance} {number}").gauss(1.0, noise))
