"""The simulated device: passes and copies take the time that a profile says, nothing is computed.

Everything around it is real: rings, step loop, batches, blocks, page pool, handoff. No torch.
"""

from collections.abc import Sequence

from nodeserve.config import Simulated, WorkerSpec
from nodeserve.layout import Shape
from nodeserve.policy.blocks import blocks_for
from nodeserve.policy.copy_plan import shards
from nodeserve.policy.cost import RankWork
from nodeserve.policy.profile import Profile, pass_factor
from nodeserve.profile_store import shaped_profile
from nodeserve.worker.alarm import Alarm
from nodeserve.worker.contract import Device, Progress, Team
from nodeserve.worker.executor_sim import SimExecutor, Tokens
from nodeserve.worker.lockstep import Board, Lockstep
from nodeserve.worker.pages import make_pool, num_blocks_in
from nodeserve.worker.transfer_sim import GEOMETRY, SimTransfer


def load(spec: WorkerSpec, progress: Progress, team: Team) -> Device:
    simulated = spec.simulated
    assert simulated is not None, "resolved for simulated workers"
    shape = Shape(spec.tp, spec.pp, spec.ep)
    profile = shaped_profile(simulated.profile, shape)
    token_bytes = profile.worker_kv_bytes(shape)
    block_bytes = token_bytes * spec.block_size
    max_blocks = blocks_for(spec.max_model_len, spec.block_size)
    memory = spec.kv_memory or profile.num_kv_tokens * token_bytes
    num_blocks = num_blocks_in(memory, block_bytes, max_blocks)
    progress("pages", 0, 1)
    pages = shards(GEOMETRY, spec.tp, spec.pp)[spec.rank % spec.team_size]
    pool = make_pool(spec.pages_fd, num_blocks * pages.block_bytes)
    progress("pages", 1, 1)
    alarm = Alarm(spec.bell_fds[spec.rank])
    executor = executor_of(spec, simulated, profile, alarm, team)
    link_bytes_per_s = profile.handoff_bytes_per_s / spec.team_size
    return Device(
        executor=executor,
        transfer=SimTransfer(pool, pages.block_bytes, block_bytes, link_bytes_per_s, alarm),
        num_blocks=team.least_blocks(num_blocks),
        block_bytes=block_bytes,
        pages=pages,
        pages_bytes=num_blocks * pages.block_bytes,
        pages_handle=b"",
        num_threads=spec.num_threads,
        kernels=f"simulated {profile.name}",
        handoff=f"simulated, {link_bytes_per_s / 1e9:g} GB/s",
        eos_token_ids=frozenset(simulated.eos_token_ids),
        following=None if spec.leads else executor,
        num_stages=spec.pp,
        attention_weight=profile.attention_weight,
    )


def executor_of(
    spec: WorkerSpec, simulated: Simulated, profile: Profile, alarm: Alarm, team: Team
) -> SimExecutor:
    """Of this worker."""

    def duration(number: int, works: Sequence[RankWork]) -> float:
        factor = pass_factor(profile.noise, simulated.seed, spec.instance, number)
        return profile.cost.pass_s(works[:: spec.team_size]) * factor  # the leaders' have it all

    board = Board(spec.board_fd, len(spec.bell_fds))
    lockstep = Lockstep(board, spec.rank, spec.bell_fds, duration, num_stages=spec.pp)
    tokens = Tokens(simulated.vocab_size, simulated.eos_token_ids)
    return SimExecutor(lockstep, alarm, tokens, team)
