"""python -m bench.gateway.worker --spec JSON: the simulated worker, with passes of one length.

Real ones vary by some percent, so that workers that began together soon step apart; workers whose
passes never vary stay in step, and all their tokens come at once.

The profiles are added to the known ones when this is imported, so import it in the coordinator's
process as well.
"""

import sys

from nodeserve.policy.cost import StepCost
from nodeserve.policy.profile import Profile
from nodeserve.policy.profiles import PROFILES
from nodeserve.worker.device import load
from nodeserve.worker.process import main

WORKER = (sys.executable, "-m", "bench.gateway.worker")
PASSES = {"apart": (0.025, 0.03), "in step": (0.025, 0.0), "swift": (0.005, 0.0)}


def profile(name: str, step_s: float, noise: float) -> Profile:
    return Profile(
        name,
        "the same time for each pass, but for noise",
        StepCost(step_s, step_s, 0.0, 0.0, 0.0, 0.0),
        noise=noise,
        num_kv_tokens=1 << 20,
        kv_bytes_per_token=1000,
        handoff_bytes_per_s=1e11,
        max_num_batched_tokens=8192,
        max_num_seqs=512,
        max_model_len=8192,
    )


PROFILES.update({name: profile(name, *passes) for name, passes in PASSES.items()})

if __name__ == "__main__":
    sys.exit(main(load))
