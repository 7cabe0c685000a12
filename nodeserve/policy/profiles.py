"""Named devices for simulation: what their passes cost, what they hold."""

from dataclasses import dataclass
from random import Random

from nodeserve.errors import ConfigError
from nodeserve.policy.cost import StepCost


@dataclass(frozen=True, slots=True)
class Profile:
    """One rank's device with one model. `source` says where the numbers are from."""

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


PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            "moe-ep8",
            "invented constants of a wide expert-parallel MoE: shapes matter, not milliseconds",
            StepCost(
                prefill_fix_s=0.060,
                decode_fix_s=0.020,
                token_s=1e-4,
                attention_s=6e-9,
                decode_seq_s=5e-5,
                kv_token_s=5e-8,
                expert_token_s=3e-5,
            ),
            noise=0.03,
            num_kv_tokens=400_000,
            kv_bytes_per_token=70_272,
            handoff_bytes_per_s=40e9,
            max_num_batched_tokens=4096,
            max_num_seqs=256,
            max_model_len=32_768,
        ),
    )
}


def profile_named(name: str) -> Profile:
    """ConfigError lists the names there are."""
    try:
        return PROFILES[name]
    except KeyError:
        raise ConfigError(f"no profile {name!r}: use one of {', '.join(PROFILES)}") from None


LEAST_FACTOR = 0.5


def pass_factor(noise: float, seed: int, instance: int, number: int) -> float:
    """What a pass's expected duration is multiplied by: normal around 1 with this deviation, the
    same for the same seed, instance and pass number."""
    if not noise:
        return 1.0
    return max(LEAST_FACTOR, Random(f"{seed} {instance} {number}").gauss(1.0, noise))
