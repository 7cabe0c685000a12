"""python -m tests.fakes.sim_worker --spec JSON: the real simulated worker, and a profile for tests.

The profile is added to the known ones when this is imported, so import it in the coordinator's
process as well. Its passes are short, and its noise would show two ranks that do not agree.
"""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from nodeserve.config import Simulated, WorkerSpec
from nodeserve.coordinator.shared import make_lockstep
from nodeserve.policy.cost import StepCost
from nodeserve.policy.profile import Profile
from nodeserve.policy.profiles import PROFILES
from nodeserve.policy.sizes import Anatomy
from nodeserve.worker.device import load
from nodeserve.worker.executor_sim import Tokens
from nodeserve.worker.process import main
from tests.fakes.faults import faulty
from tests.fakes.harness import default_spec

SIM_WORKER = (sys.executable, "-m", "tests.fakes.sim_worker")
VOCAB = 97
EOS = (3, 5)
SEED = 7
ANATOMY = Anatomy(8, 8, row_bytes=1000, weight_bytes=1e6)
QUICK = Profile(
    "quick",
    "for tests",
    StepCost(0.004, 0.002, 1e-5, 0.0, 1e-5, 0.0, 1e-5),
    noise=0.2,
    num_kv_tokens=4096,
    kv_bytes_per_token=1000,
    handoff_bytes_per_s=1e9,
    max_num_batched_tokens=64,
    max_num_seqs=16,
    max_model_len=1024,
    anatomy=ANATOMY,
)
# Pages take a second for each block: a fault meets them on their way for certain. What tensor ranks
# tell each other does not go that way.
FAR_APART = replace(
    QUICK,
    name="far-apart",
    handoff_bytes_per_s=16e3,
    anatomy=replace(ANATOMY, sum_bytes_per_s=1e9),
)
SLOW = replace(  # every phase of a request lasts long enough to be met in it
    QUICK,
    name="slow",
    cost=StepCost(0.05, 0.01, 1e-5, 0.0, 1e-5, 0.0, 1e-5),
    handoff_bytes_per_s=1e5,  # a block in 0.16 s
)
STEADY = replace(  # long passes, all alike: what a busy machine adds to them is little
    QUICK, name="steady", cost=StepCost(0.04, 0.01, 0.0, 0.0, 0.0, 0.0), noise=0.0
)
PROFILES.update({one.name: one for one in (QUICK, FAR_APART, SLOW, STEADY)})


def expected_stream(
    prompt: Sequence[int],
    num_tokens: int,
    eos_token_ids: tuple[int, ...] = (),
    vocab_size: int = VOCAB,
) -> list[int]:
    """What a request must get, whatever happens to it on its way."""
    tokens, stream = Tokens(vocab_size, eos_token_ids), list(prompt)
    for _ in range(num_tokens):
        stream.append(tokens.after(stream[-1], len(stream) - 1))
    return stream[len(prompt) :]


def rank_specs(
    owner: ExitStack, num_ranks: int, instance: int = 0
) -> tuple[list[WorkerSpec], tuple[int, ...]]:
    """One instance's workers, and the descriptors that they inherit."""
    lockstep = make_lockstep(num_ranks)
    owner.callback(lockstep.close)
    specs = [
        default_spec(
            index=num_ranks * instance + rank,
            device="sim",
            max_model_len=QUICK.max_model_len,
            kv_memory=QUICK.num_kv_tokens * QUICK.kv_bytes_per_token,
            max_num_batched_tokens=QUICK.max_num_batched_tokens,
            instance=instance,
            rank=rank,
            board_fd=lockstep.board,
            bell_fds=lockstep.bells,
            simulated=Simulated(QUICK.name, SEED, VOCAB, EOS),
        )
        for rank in range(num_ranks)
    ]
    return specs, lockstep.inherited


if __name__ == "__main__":
    sys.exit(main(faulty(load)))
