"""Ranks of one simulated instance as real processes; the test is the coordinator."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from nodeserve.policy.cost import RankWork
from nodeserve.policy.profile import pass_factor
from nodeserve.wire.messages import PagesAttached, Shutdown, StepDone, unpack_request_ids
from tests.fakes.harness import WorkerProcess, hand_over, started
from tests.fakes.sim_worker import EOS, QUICK, SEED, SIM_WORKER, expected_stream, rank_specs
from tests.patience import PATIENCE_S

PROMPT = [7 * i % 91 + 1 for i in range(70)]


@pytest.fixture
def ranks() -> Iterator[list[WorkerProcess]]:
    """Three of one instance."""
    with ExitStack() as owner:
        specs, fds = rank_specs(owner, 3)
        with started(*specs, command=SIM_WORKER, pass_fds=fds) as workers:
            yield workers


def passes(worker: WorkerProcess) -> dict[int, StepDone]:
    return {said.step: said for said in worker.said if isinstance(said, StepDone)}


def all_told(ranks: list[WorkerProcess]) -> list[dict[int, StepDone]]:
    """Every rank's passes, once all have told of all of them."""
    last = max(max(passes(rank), default=0) for rank in ranks)
    for rank in ranks:
        rank.until(lambda rank=rank: last in passes(rank))  # type: ignore[misc]
    return [passes(rank) for rank in ranks]


def test_all_ranks_run_and_report_the_same_passes(ranks: list[WorkerProcess]) -> None:
    first, second, third = ranks
    first.prefill(1, PROMPT, max_tokens=20)
    first.until(lambda: 1 in first.streams)
    second.prefill(2, PROMPT[:5], max_tokens=6)
    first.finish(1)
    second.finish(2)
    told = all_told(ranks)
    assert set(told[0]) == set(told[1]) == set(told[2]) == set(range(1, len(told[0]) + 1))
    for number in told[0]:
        times = [(one[number].began_s, one[number].step_s) for one in told]
        assert times[0] == times[1] == times[2], "they begin and end together"
    assert first.streams[1] == expected_stream(PROMPT, 20, EOS)
    assert second.streams[2] == expected_stream(PROMPT[:5], 6, EOS)
    idle = passes(third).values()
    assert not any(said.request_ids or said.num_prefill_tokens or said.kv_tokens for said in idle)
    by_start = sorted(told[0].values(), key=lambda said: said.step)
    for one, following in zip(by_start, by_start[1:], strict=False):
        assert following.began_s >= one.began_s + one.step_s


def test_a_pass_takes_what_the_profile_says_for_all_ranks_together(
    ranks: list[WorkerProcess],
) -> None:
    for rank in ranks[:2]:
        rank.prefill(rank.spec.rank, PROMPT[:64], max_tokens=1)
        rank.finish(rank.spec.rank)
    told = all_told(ranks)
    for number, said in told[0].items():
        works = [_work(one[number]) for one in told]
        factor = pass_factor(QUICK.noise, SEED, 0, number)
        assert said.step_s == pytest.approx(QUICK.cost.pass_s(works) * factor)
    assert [sum(said.num_prefill_tokens for said in one.values()) for one in told] == [64, 64, 0]


def _work(said: StepDone) -> RankWork:
    return RankWork(said.num_prefill_tokens, said.attention, 0, said.kv_tokens)


def test_without_work_no_pass_runs(ranks: list[WorkerProcess]) -> None:
    first, second, third = ranks
    first.prefill(1, PROMPT, max_tokens=3)
    first.finish(1)
    number = max(passes(first))
    third.prefill(2, PROMPT, max_tokens=1)
    third.finish(2)
    assert min(n for n, said in passes(third).items() if said.started) == number + 1
    assert unpack_request_ids(passes(third)[number + 1].started).tolist() == [2]
    assert not second.finished


def test_ranks_leave_at_once_whatever_the_others_wait_for(ranks: list[WorkerProcess]) -> None:
    first, second, third = ranks
    third.process.kill()
    third.process.wait()
    first.prefill(1, PROMPT, max_tokens=100)  # a pass that can never begin
    for rank in (first, second):
        rank.send(Shutdown())
        assert rank.process.wait(PATIENCE_S) == 0
    assert not passes(first)


def test_a_request_handed_over_continues_the_same_stream() -> None:
    with ExitStack() as owner:
        sources, source_fds = rank_specs(owner, 1)
        targets, target_fds = rank_specs(owner, 1, instance=1)
        fds = (*source_fds, *target_fds)
        with started(*sources, *targets, command=SIM_WORKER, pass_fds=fds) as [source, target]:
            target.attach(source)
            target.expect(PagesAttached)
            pulled = hand_over(source, target, 1, PROMPT, max_tokens=12, logprobs=3)
            target.finish(1)
            assert source.streams[1] + target.streams[1] == expected_stream(PROMPT, 12, EOS)
            block_bytes = QUICK.kv_bytes_per_token * 16
            assert pulled.num_bytes == 5 * block_bytes
            assert pulled.seconds == pulled.num_bytes / QUICK.handoff_bytes_per_s
            assert all(len(passes(target)[n].logprobs or ()) == 1 for n in passes(target))


def test_a_simulated_worker_loads_neither_torch_nor_numpy() -> None:
    with ExitStack() as owner:
        specs, fds = rank_specs(owner, 1)
        with started(*specs, command=SIM_WORKER, pass_fds=fds) as [worker]:
            maps = Path(f"/proc/{worker.process.pid}/maps").read_text()
            assert "_host" in maps and "torch" not in maps and "numpy" not in maps
