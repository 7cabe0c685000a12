"""python -m bench.gateway.worker --spec JSON: the simulated worker, with passes that never vary.

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
STEPS_S = {"steady": 0.025, "swift": 0.005}


def profile(name: str, step_s: float) -> Profile:
    return Profile(
        name,
        "a fixed time for each pass",
        StepCost(step_s, step_s, 0.0, 0.0, 0.0, 0.0),
        noise=0.0,
        num_kv_tokens=1 << 20,
        kv_bytes_per_token=1000,
        handoff_bytes_per_s=1e11,
        max_num_batched_tokens=8192,
        max_num_seqs=512,
        max_model_len=8192,
    )


PROFILES.update({name: profile(name, step_s) for name, step_s in STEPS_S.items()})

if __name__ == "__main__":
    sys.exit(main(load))
