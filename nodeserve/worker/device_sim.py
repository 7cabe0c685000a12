"""The simulated device: passes and copies take the time that a profile says, nothing is computed.

Everything around it is real: rings, step loop, batches, blocks, page pool, handoff. No torch.
"""

from collections.abc import Sequence

from nodeserve.config import WorkerSpec
from nodeserve.policy.blocks import blocks_for
from nodeserve.policy.copy_plan import shards
from nodeserve.policy.cost import RankWork
from nodeserve.policy.profile import pass_factor
from nodeserve.profile_store import one_profile
from nodeserve.worker.alarm import Alarm
from nodeserve.worker.contract import Device, Progress, Team
from nodeserve.worker.executor_sim import SimExecutor, Tokens
from nodeserve.worker.lockstep import Board, Lockstep
from nodeserve.worker.pages import make_pool, num_blocks_in
from nodeserve.worker.transfer_sim import GEOMETRY, SimTransfer


def load(spec: WorkerSpec, progress: Progress, team: Team) -> Device:
    simulated = spec.simulated
    assert simulated is not None and spec.kv_memory is not None, "resolved for simulated workers"
    profile = one_profile(simulated.profile)
    block_bytes = profile.kv_bytes_per_token * spec.block_size
    max_blocks = blocks_for(spec.max_model_len, spec.block_size)
    num_blocks = num_blocks_in(spec.kv_memory, block_bytes, max_blocks)
    progress("pages", 0, 1)
    pages = shards(GEOMETRY, spec.tp, spec.pp)[spec.rank % spec.team_size]
    pool = make_pool(spec.pages_fd, num_blocks * pages.block_bytes)
    progress("pages", 1, 1)
    alarm = Alarm(spec.bell_fds[spec.rank])
    board = Board(spec.board_fd, len(spec.bell_fds))

    def duration(number: int, works: Sequence[RankWork]) -> float:
        factor = pass_factor(profile.noise, simulated.seed, spec.instance, number)
        return profile.cost.pass_s(works[:: spec.team_size]) * factor  # the leaders' have it all

    lockstep = Lockstep(board, spec.rank, spec.bell_fds, duration)
    tokens = Tokens(simulated.vocab_size, simulated.eos_token_ids)
    executor = SimExecutor(lockstep, alarm, tokens, team)
    return Device(
        executor=executor,
        transfer=SimTransfer(
            pool,
            pages.block_bytes,
            block_bytes * pages.block_bytes // shards(GEOMETRY)[0].block_bytes,
            profile.handoff_bytes_per_s / spec.team_size,  # which is that of all of its devices
            alarm,
        ),
        num_blocks=team.least_blocks(num_blocks),
        block_bytes=block_bytes,
        pages=pages,
        pages_bytes=num_blocks * pages.block_bytes,
        pages_handle=b"",
        num_threads=spec.num_threads,
        kernels=f"simulated {profile.name}",
        handoff=f"simulated, {profile.handoff_bytes_per_s / 1e9:g} GB/s",
        eos_token_ids=frozenset(simulated.eos_token_ids),
        following=None if spec.leads else executor,
    )
