"""Small scenarios with times that can be reckoned by hand."""

from typing import Any

from nodeserve.plan.records import Scenario
from nodeserve.policy.cost import StepCost
from nodeserve.policy.profile import Profile
from nodeserve.policy.units import DispatchOptions

PASS_S, STEP_S, TRANSIT_S = 0.1, 0.01, 0.002


def profile(
    num_blocks: int = 1024, max_num_seqs: int = 256, num_stages: int = 1, **cost: float
) -> Profile:
    """Constant passes, unless `cost` says more; blocks of 16 tokens that travel in 16 ms."""
    coefficients: dict[str, Any] = {
        "prefill_fix_s": PASS_S,
        "decode_fix_s": STEP_S,
        **dict.fromkeys(("token_s", "attention_s", "decode_seq_s", "kv_token_s"), 0.0),
        **cost,
    }
    return Profile(
        name="test",
        source="a test",
        cost=StepCost(**coefficients),
        noise=0.0,
        num_kv_tokens=16 * num_blocks,
        kv_bytes_per_token=1000,
        handoff_bytes_per_s=1e6,
        max_num_batched_tokens=4096,
        max_num_seqs=max_num_seqs,
        max_model_len=4096,
        num_stages=num_stages,
    )


def scenario(layout: str, **changes: Any) -> Scenario:
    """A node with that profile."""
    fields: dict[str, Any] = {
        "profile": profile(),
        "dispatch": DispatchOptions(budget=4096),
        "transit_s": TRANSIT_S,
        **changes,
    }
    return Scenario(layout, **fields)
