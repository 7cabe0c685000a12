"""Where prefilled requests decode: the rules one by one, and what holds for all of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodeserve.policy.account import Account
from nodeserve.policy.blocks import watermark
from nodeserve.policy.cost import RankWork, StepCost
from nodeserve.policy.decode_allocation import FIRST_SHARE, LEAST_STEPS, DecodeAllocator, ReadyKv
from nodeserve.policy.decode_round import TOGETHER
from nodeserve.policy.units import DECODE_ALLOCATIONS, Unit
from nodeserve.types import Load

POOL = 1000
MAX_SEQS = 64


def unit(index: int, num_sequences: int = 0, kv_blocks: int = 0, pool: int = POOL) -> Unit:
    account = Account(pool)
    account.report(Load(num_sequences, 0, 0, pool - kv_blocks, 0, 0))
    return Unit(index, 0, account)


def units_of(num_sequences: Sequence[int], kv_blocks: Sequence[int]) -> list[Unit]:
    return [unit(i, b, k) for i, (b, k) in enumerate(zip(num_sequences, kv_blocks, strict=True))]


def ready(*num_blocks: int, growth: int = 0, first_id: int = 0) -> list[ReadyKv]:
    return [ReadyKv(first_id + i, blocks, growth) for i, blocks in enumerate(num_blocks)]


def places(
    allocator: DecodeAllocator, units: Sequence[Unit], *num_blocks: int, growth: int = 0
) -> list[int | None]:
    return [index for _, index in allocator.place(ready(*num_blocks, growth=growth), units)]


def taught(cost: StepCost, num_steps: int = 400) -> DecodeAllocator:
    """A cost allocator that has seen decode steps of eight ranks."""
    allocator, rng = DecodeAllocator("cost", MAX_SEQS), Random(1)
    for _ in range(num_steps):
        counts = [rng.randrange(1, 64) for _ in range(8)]
        ranks = [RankWork(0, 0.0, n, n * rng.randrange(200, 3000)) for n in counts]
        allocator.observe(ranks, cost.pass_s(ranks))
    return allocator


COUNTS = StepCost(0.0, 0.02, 0.0, 0.0, 1e-3, 1e-9)  # sequences make a step long
CONTEXTS = StepCost(0.0, 0.02, 0.0, 0.0, 1e-6, 1e-7)  # tokens do: 16e-7 s a block


# ---- which of several with room


IQR_CASES = {
    "an outlier of four": ([1, 1, 1, 0], [10, 12, 14, 100], [1], [0]),
    "three units have none": ([1, 1, 0], [10, 12, 100], [1], [2]),
    "longest first": ([0, 0], [0, 1], [1, 3], [1, 0]),
    "the fewest requests before the least KV": ([2, 1, 2, 2], [10, 16, 12, 14], [1], [1]),
    "equal requests: the least KV": ([1, 1, 1, 1], [13, 12, 11, 12], [1], [2]),
    "all equal: the first": ([1, 1, 1, 1], [5, 5, 5, 5], [1], [0]),
    "one block more is no outlier": ([1] * 7 + [0], [100] * 7 + [101], [1], [7]),
    "nor are five in a hundred": ([1] * 7 + [0], [100] * 7 + [105], [1], [7]),
    "but ten are": ([1] * 7 + [0], [100] * 7 + [110], [1], [0]),
    "one block on empty units": ([1, 1, 1, 1, 0], [0, 0, 0, 0, 1], [1], [4]),
    "three of eight are no outliers": ([1] * 5 + [0] * 3, [10] * 5 + [500] * 3, [1], [5]),
    "each placement counts for the next": ([0, 0, 0], [0, 0, 0], [5, 4, 3, 2, 1], [0, 1, 2, 2, 1]),
}


@pytest.mark.parametrize("name", IQR_CASES)
def test_iqr_takes_the_fewest_requests_of_those_that_are_no_outlier(name: str) -> None:
    num_sequences, kv_blocks, blocks, expected = IQR_CASES[name]
    units = units_of(num_sequences, kv_blocks)
    assert places(DecodeAllocator("iqr", MAX_SEQS), units, *blocks) == expected


def test_an_outlier_is_better_than_to_wait() -> None:
    """All but the one with the most KV are full."""
    units = [unit(i, 1, 195, pool=200) for i in range(4)] + [unit(4, 1, 500)]
    assert places(DecodeAllocator("iqr", MAX_SEQS), units, 50) == [4]


def test_round_robin_goes_on_where_it_was() -> None:
    allocator, units = DecodeAllocator("round-robin", MAX_SEQS), units_of([0, 0, 9], [0, 0, 99])
    assert places(allocator, units, 1, 1) == [0, 1]
    assert places(allocator, units, 1, 1, 1) == [2, 0, 1]
    units[2].account.refused = True
    assert places(allocator, units, 1, 1) == [0, 1]


def test_fewest_requests_looks_at_nothing_else() -> None:
    units = units_of([3, 2, 2], [0, 500, 400])
    assert places(DecodeAllocator("fewest-requests", MAX_SEQS), units, 1, 1, 1) == [1, 2, 0]


def test_the_cost_rule_weighs_requests_against_tokens() -> None:
    many_short, few_long = [40, 4], [40, 400]
    assert places(taught(COUNTS), units_of(many_short, few_long), 1) == [1]
    assert places(taught(CONTEXTS), units_of(many_short, few_long), 1) == [0]


def test_the_cost_rule_evens_out_what_ranks_take_longest_first() -> None:
    allocator = taught(CONTEXTS)
    assert places(allocator, units_of([0, 0], [0, 0]), 10, 30, 60, 50) == [0, 1, 0, 1]


def test_without_steps_seen_cost_is_iqr() -> None:
    units = units_of([40, 4], [40, 400])
    allocator = taught(CONTEXTS, LEAST_STEPS - 1)
    assert places(allocator, units, 1) == places(DecodeAllocator("iqr", MAX_SEQS), units, 1) == [1]


@pytest.mark.parametrize("policy", DECODE_ALLOCATIONS)
def test_answers_come_in_the_order_asked_and_are_booked(policy: str) -> None:
    units = units_of([0, 0], [0, 0])
    round_ = ready(1, 5, 3)
    placed = DecodeAllocator(policy, MAX_SEQS).place(round_, units)
    assert [one for one, _ in placed] == round_
    for number, account in enumerate(one.account for one in units):
        mine = [one.num_blocks for one, index in placed if index == number]
        assert account.num_sequences == len(mine) and account.free_blocks == POOL - sum(mine)


# ---- room


@pytest.mark.parametrize("policy", DECODE_ALLOCATIONS)
class TestRoom:
    def test_nobody_to_ask(self, policy: str) -> None:
        assert places(DecodeAllocator(policy, MAX_SEQS), [], 1) == [None]
        assert DecodeAllocator(policy, MAX_SEQS).place([], [unit(0)]) == []

    def test_an_empty_unit_takes_what_fits_however_much_it_may_grow(self, policy: str) -> None:
        allocator = DecodeAllocator(policy, MAX_SEQS)
        assert places(allocator, [unit(0)], POOL, growth=10 * POOL) == [0]
        assert places(allocator, [unit(0)], POOL + 1) == [None]

    def test_pools_of_two_sizes(self, policy: str) -> None:
        units = [unit(0, pool=100), unit(1, pool=500)]
        allocator = DecodeAllocator(policy, MAX_SEQS)
        assert places(allocator, units, 300, growth=1000) == [1]
        assert places(allocator, units, 90, growth=1000) == [0]

    def test_slots(self, policy: str) -> None:
        assert places(DecodeAllocator(policy, 2), [unit(0, 1)], 1, 1) == [0, None]

    def test_after_a_refusal_a_unit_waits_for_a_report(self, policy: str) -> None:
        allocator, units = DecodeAllocator(policy, MAX_SEQS), [unit(0)]
        units[0].account.refused = True
        assert places(allocator, units, 1) == [None]
        units[0].account.report(Load(0, 0, 0, POOL, 0, 0))
        assert places(allocator, units, 1) == [0]

    def test_what_the_worker_keeps_is_not_asked_for(self, policy: str) -> None:
        """A hundredth of the pool, as policy.scheduler does, once it decodes anything."""
        units = [unit(0, 1, kv_blocks=900)]
        assert places(DecodeAllocator(policy, MAX_SEQS), units, 91) == [None]
        assert places(DecodeAllocator(policy, MAX_SEQS), units, 90) == [0]

    def test_a_block_for_each_sequence_that_runs(self, policy: str) -> None:
        units = [unit(0, 50, kv_blocks=900)]
        assert places(DecodeAllocator(policy, MAX_SEQS), units, 51) == [None]
        assert places(DecodeAllocator(policy, MAX_SEQS), units, 50) == [0]

    def test_growth_that_is_expected_is_kept_free(self, policy: str) -> None:
        allocator, units = DecodeAllocator(policy, MAX_SEQS), [unit(0)]
        assert places(allocator, units, 100, growth=500) == [0]
        kept = 100 + FIRST_SHARE * 500
        (over,) = ready(int(POOL - kept) + 1, first_id=7)
        (fits,) = ready(int(POOL - kept), first_id=8)
        assert allocator.place([over], units) == [(over, None)]
        assert allocator.place([fits], units) == [(fits, 0)]

    def test_a_newcomer_brings_its_own_growth(self, policy: str) -> None:
        units = [unit(0, 1, kv_blocks=100)]
        room = POOL - 100 - POOL // 100
        growth = 500
        fits = int(room - TOGETHER * FIRST_SHARE * growth)
        assert places(DecodeAllocator(policy, MAX_SEQS), units, fits + 1, growth=growth) == [None]
        assert places(DecodeAllocator(policy, MAX_SEQS), units, fits, growth=growth) == [0]

    def test_growth_that_happened_is_not_expected_again(self, policy: str) -> None:
        allocator, units = DecodeAllocator(policy, MAX_SEQS), [unit(0)]
        assert places(allocator, units, 100, growth=500) == [0]
        units[0].account.report(Load(1, 0, 0, POOL - 250, 0, 1))  # it grew by 150 of 250
        (one,) = ready(POOL - 250 - 100, first_id=7)
        assert allocator.place([one], units) == [(one, 0)]

    def test_one_that_grew_beyond_what_was_expected_lends_nothing(self, policy: str) -> None:
        allocator, units = DecodeAllocator(policy, MAX_SEQS), [unit(0)]
        assert places(allocator, units, 100, growth=200) == [0]
        units[0].account.report(Load(1, 0, 0, POOL - 400, 0, 1))  # 300 instead of 100
        first, over = *ready(200, growth=800, first_id=7), *ready(151, first_id=8)
        assert allocator.place([first, over], units) == [(first, 0), (over, None)]  # 250 are kept

    def test_many_do_not_need_all_their_growth_at_once(self, policy: str) -> None:
        for num, together in ((1, 1.0), (2, 0.625), (6, 0.375)):
            allocator, units = DecodeAllocator(policy, MAX_SEQS), [unit(0)]
            assert places(allocator, units, *[10] * num, growth=160) == [0] * num
            kept = FIRST_SHARE * 160 * num * together
            (over,) = ready(int(POOL - 10 * num - kept) + 1, first_id=97)
            (fits,) = ready(int(POOL - 10 * num - kept), first_id=98)
            assert allocator.place([over], units) == [(over, None)]
            assert allocator.place([fits], units) == [(fits, 0)]

    def test_growth_ends_with_the_request(self, policy: str) -> None:
        allocator, units = DecodeAllocator(policy, MAX_SEQS), [unit(0, 1, 10)]
        assert places(allocator, units, 100, growth=2000) == [0]
        units[0].account.report(Load(1, 0, 0, POOL - 10, 0, 1))
        (one,) = ready(POOL - 10 - 10, first_id=7)
        assert allocator.place([one], units) == [(one, None)]
        allocator.forget(0)
        allocator.forget(0)
        assert allocator.place([one], units) == [(one, 0)]

    def test_a_refused_request_is_counted_where_it_is_placed_next(self, policy: str) -> None:
        allocator, units = DecodeAllocator(policy, MAX_SEQS), [unit(0), unit(1, 1, 1)]
        (one,) = ready(100, growth=2000)
        assert allocator.place([one], units) == [(one, 0)]
        units[0].account.report(Load(0, 0, 0, POOL, 0, 1))
        units[0].account.refused = True
        assert allocator.place([one], units) == [(one, 1)]
        units[0].account.report(Load(1, 0, 0, POOL, 0, 1))
        (large,) = ready(POOL - 10, first_id=7)
        assert allocator.place([large], units) == [(large, 0)]


def test_the_share_of_growth_is_learned_from_those_that_ended() -> None:
    allocator = DecodeAllocator("iqr", MAX_SEQS)
    assert allocator.growth_share == FIRST_SHARE
    for number in range(200):
        allocator.place(ready(10, growth=100, first_id=number), [unit(0)])
        allocator.forget(number, 100 if number % 2 else 0)  # those that grow are all one ever sees
    assert allocator.growth_share == pytest.approx(1.0, abs=0.02)
    for number in range(1000, 1400):
        allocator.place(ready(10, growth=100, first_id=number), [unit(0)])
        allocator.forget(number, 20)
    assert 0.2 < allocator.growth_share < 0.6
    allocator.forget(5, 1000)  # unknown
    assert allocator.growth_share < 0.6


# ---- the line


@pytest.mark.parametrize("policy", DECODE_ALLOCATIONS)
class TestLine:
    def test_where_not_all_fit_the_first_in_line_go_first(self, policy: str) -> None:
        """Balance would begin with the longest."""
        assert places(DecodeAllocator(policy, 2), [unit(0, 1, 0)], 1, 100) == [0, None]

    def test_those_behind_one_without_room_get_the_other_units(self, policy: str) -> None:
        units = [unit(0, 1, 300), unit(1, 1, 200), unit(2, 1, 400)]
        allocator = DecodeAllocator(policy, MAX_SEQS)
        assert places(allocator, units, 900, 700, 500, 300) == [None, None, 0, 2]

    def test_the_unit_that_is_kept_stays_kept(self, policy: str) -> None:
        units = [unit(0, 1, 300), unit(1, 1, 200)]
        allocator = DecodeAllocator(policy, MAX_SEQS)
        assert places(allocator, units, 900, 10) == [None, 0]
        units[0].account.report(Load(0, 0, 0, 850, 0, 1))  # now it has the most room
        assert places(allocator, units, 900, 10) == [None, 0]
        units[1].account.report(Load(0, 0, 0, POOL, 0, 0))
        assert places(allocator, units, 900, 10) == [1, 0]

    def test_it_is_not_kept_for_one_that_went_away(self, policy: str) -> None:
        units = [unit(0, 1, 900), unit(1, 1, 200)]
        allocator = DecodeAllocator(policy, MAX_SEQS)
        assert places(allocator, units, 900, 100) == [None, None]
        assert places(allocator, units, 100) == [1]

    def test_nothing_is_kept_for_what_fits_nowhere(self, policy: str) -> None:
        allocator = DecodeAllocator(policy, MAX_SEQS)
        assert places(allocator, [unit(0, 1, 10)], POOL + 1, 10) == [None, 0]


# ---- whole lives


@dataclass
class FakeWorker:
    """Grows each sequence to its end, a block a tick; reports when it is told to."""

    unit: Unit
    sequences: dict[int, list[int]] = field(default_factory=dict)  # id: blocks, blocks to come
    num_received: int = 0

    @property
    def num_free(self) -> int:
        return self.unit.account.num_blocks - sum(blocks for blocks, _ in self.sequences.values())

    def take(self, one: ReadyKv, max_num_seqs: int) -> bool:
        """A pull arrives; what grew since the last report may leave no room for it."""
        self.num_received += 1
        assert len(self.sequences) < max_num_seqs
        kept = watermark(self.unit.account.num_blocks) if self.sequences else 0
        if one.num_blocks + kept > self.num_free:
            self.report()
            self.unit.account.refused = True
            return False
        self.sequences[one.request_id] = [one.num_blocks, one.growth_blocks]
        return True

    def tick(self, allocator: DecodeAllocator) -> None:
        for request_id, sequence in list(self.sequences.items()):
            if sequence[1] == 0 or self.num_free == 0:
                del self.sequences[request_id]  # it ended, or is preempted and goes elsewhere
                allocator.forget(request_id)
            else:
                sequence[0] += 1
                sequence[1] -= 1

    def report(self) -> None:
        num = len(self.sequences)
        self.unit.account.report(Load(num, 0, 0, self.num_free, 0, self.num_received))


rounds = st.lists(
    st.tuples(
        st.lists(st.tuples(st.integers(1, 60), st.integers(0, 12)), max_size=6), st.integers(0, 7)
    ),
    max_size=25,
)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(DECODE_ALLOCATIONS), rounds, st.integers(1, 5))
def test_no_life_overcommits_loses_or_starves(
    policy: str, arrivals: list[tuple[list[tuple[int, int]], int]], max_num_seqs: int
) -> None:
    allocator = DecodeAllocator(policy, max_num_seqs)
    workers = [FakeWorker(unit(i, pool=pool)) for i, pool in enumerate((40, 60, 60))]
    units = [worker.unit for worker in workers]
    line: list[ReadyKv] = []
    placed_ids: set[int] = set()
    waited: dict[int, int] = {}  # rounds at the head of the line
    number = 0
    for batch, silent in arrivals + [([], 0)] * 400:
        line += [ReadyKv(number + i, *one) for i, one in enumerate(batch)]
        number += len(batch)
        answers = allocator.place(line, units)
        assert [one for one, _ in answers] == line
        for worker in workers:
            account = worker.unit.account
            assert account.free_blocks >= 0 and account.num_sequences <= max_num_seqs
            if account.num_sequences == 0 and not account.refused:
                left = [one for one, index in answers if index is None]
                assert all(one.num_blocks > account.free_blocks for one in left)
        line = []
        for one, index in answers:
            if index is None or not workers[index].take(one, max_num_seqs):
                line.append(one)
            else:
                assert one.request_id not in placed_ids
                placed_ids.add(one.request_id)
        if line:
            waited[line[0].request_id] = waited.get(line[0].request_id, 0) + 1
        for place, worker in enumerate(workers):
            worker.tick(allocator)
            if not silent >> place & 1:
                worker.report()
    assert len(placed_ids) == number
    # Its unit is kept for it: it waits for who was there, who grow by 12 blocks at most.
    assert max(waited.values(), default=0) <= len(arrivals) + 16
