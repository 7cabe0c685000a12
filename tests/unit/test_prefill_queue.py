"""What the outside can know of a unit's next passes."""

from nodeserve.policy.cost import RankWork
from nodeserve.policy.prefill_queue import PrefillQueue


def sent(*lengths: int) -> PrefillQueue:
    queue = PrefillQueue()
    for num_tokens in lengths:
        queue.send(num_tokens)
    return queue


def test_a_pass_takes_prompts_in_order_up_to_the_budget() -> None:
    queue = sent(100, 50, 200)
    assert queue.work(128) == RankWork(128, 100 * 50.0 + 28 * 14.0)
    assert queue.work(1000) == RankWork(350, 100 * 50.0 + 50 * 25.0 + 200 * 100.0)


def test_a_started_prompt_attends_to_what_is_computed() -> None:
    queue = sent(100)
    queue.sync(40)
    assert queue.work(128) == RankWork(40, 40 * (60 + 20.0))
    queue.sync(0)
    assert queue.work(128) == RankWork(0, 0.0)


def test_the_account_wins_where_the_two_disagree() -> None:
    queue = sent(10)
    queue.sync(25)  # the worker has more than we know of
    assert queue.num_tokens == 25 and queue.work(100).prefill_tokens == 25
    queue.sync(3)
    assert queue.work(100).prefill_tokens == 3
