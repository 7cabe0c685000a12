"""The lockstep benchmark's own logic: its ceiling, its requests, one run of each arm."""

import pytest

from bench import moe
from nodeserve.policy.cost import RankWork


def test_the_ceiling_is_every_rank_full_in_every_pass() -> None:
    profile = moe.rank_profile()
    budget = profile.max_num_batched_tokens
    pass_s = profile.cost.pass_s([RankWork(budget, budget * 750)] * 32)
    assert moe.ceiling_tokens_per_s() == pytest.approx(4 * 32 * budget / pass_s)


def test_all_arms_get_the_same_requests_at_the_rate_of_their_load() -> None:
    few, many = (moe.Point("pull", load, 11, 400) for load in (0.3, 0.6))
    slow, fast = moe.requests_of(few), moe.requests_of(many)
    assert moe.requests_of(few._replace(arm="staggered")) == slow
    assert [one.num_prompt_tokens for one in slow] == [one.num_prompt_tokens for one in fast]
    assert slow[-1].arrived_s == pytest.approx(2 * fast[-1].arrived_s)
    tokens = sum(one.num_prompt_tokens for one in fast)
    rate = tokens / fast[-1].arrived_s / moe.ceiling_tokens_per_s()
    assert rate == pytest.approx(0.6, rel=0.15)


@pytest.mark.parametrize("arm", moe.ARMS)
def test_a_run_serves_everything(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "INSTANCES", 2)
    row = moe.run(moe.Point(arm, 0.5, 11, 100))
    assert 0 < row.mean_ttft_ms <= row.p99_ttft_ms
    for share in (row.utilisation, row.balance, row.active_ranks, row.busy):
        assert 0 < share <= 1


def test_means_and_ratios() -> None:
    rows = [
        moe.Row(arm, 0.6, ms, 2 * ms, 0.5, 0.5, 0.5, 0.5)
        for arm, ms in (("round-robin", 200.0), ("shortest-queue", 100.0), ("staggered", 80.0))
    ]
    assert moe.ratio(rows, 0.6) == (0.8, "shortest-queue")
    assert moe.mean_of(rows[:2]).mean_ttft_ms == 150.0
    assert moe.mean_of(rows[:2]).p99_ttft_ms == 300.0
