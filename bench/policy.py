"""What a scheduling decision costs: microseconds a request, and how they grow with the backlog.

    python -m bench.policy [--smoke]

Policy is pure Python between two passes of a device, so its cost is the coordinator's. Floors
first: what the least structures with the same duty take, a heap of so many requests and a sorted
list of so many units. Then, with 1,000 requests in the buffer and 64 ranks (8 instances of 8):

    push, on_pass, decide   the dispatcher of prefills, driven by passes of the moe-ep8 cost in
                            virtual time with the buffer kept full; decide is quoted for each
                            request that boards, with all that was done on the way, and a call
    forecast                what a newcomer can expect of both phases
    place                   each decode allocation: what a request costs in rounds of 1, 8 and
                            1,000 (looking at every unit once is part of a round), and in a line of
                            1,000 for which there is no room
    pass times, judge       one observation, one prediction, one verdict

A tenth of the requests, ten times as many, and ten times the units show the growth: with O(log n) a
request takes a few times log2(10) = 3.3 more steps. Times are the best of several repeats (the
machine is shared).
"""

import argparse
import functools
import gc
import heapq
import itertools
import os
from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import asdict, dataclass
from random import Random

from bench.prefills import (
    BLOCK_SIZE,
    BUDGET,
    NUM_BLOCKS,
    NUM_RANKS,
    PROFILE,
    Clock,
    Prefills,
    now_ns,
    prompt_tokens,
)
from bench.report import emit
from nodeserve.policy.account import Account
from nodeserve.policy.cost import RankWork
from nodeserve.policy.decode_allocation import DecodeAllocator, ReadyKv
from nodeserve.policy.flow import Buffered, FlowOptions, judge
from nodeserve.policy.foresight import Forecast, Foresight
from nodeserve.policy.pass_times import PassTimes
from nodeserve.policy.units import DECODE_ALLOCATIONS, Unit, Wait, Waiting
from nodeserve.types import Load, Slo


@dataclass(frozen=True, slots=True)
class Config:
    num_requests: int = 1000
    num_instances: int = 8
    admissions: tuple[str, ...] = ("staggered", "pull")
    num_passes: int = 400
    num_rounds: int = 40
    num_calls: int = 2000
    repeats: int = 5


SMOKE = Config(num_requests=30, num_passes=16, num_rounds=2, num_calls=20, repeats=1)


# ---- prefill


def measure_dispatcher(admission: str, num_buffered: int, config: Config) -> dict[str, float]:
    """Microseconds of each kind of call."""
    runs = []
    for _ in range(config.repeats):
        prefills = Prefills(admission, config.num_instances, num_buffered)
        prefills.run(4 * config.num_instances)
        prefills.forget_times()
        gc.collect()
        prefills.run(config.num_passes)
        newcomer = Waiting(-1, 1500, 94, prefills.now_s)
        foresight = Foresight(prefills.dispatcher, taught("cost"))
        decoders = decode_units(config.num_instances * NUM_RANKS, full=False)
        forecast = functools.partial(
            foresight.forecast, newcomer, 200, decoders, num_buffered, prefills.now_s
        )
        decide = prefills.decide
        runs.append(
            {
                "push_us": prefills.push.us(prefills.push.num_calls),
                "on_pass_us": prefills.on_pass.us(prefills.on_pass.num_calls),
                "decide_us_per_request": decide.us(prefills.num_boarded),
                "decide_us_per_call": decide.us(decide.num_calls),
                "forecast_us": each_us(forecast, config.num_calls),
                "requests_per_pass": prefills.num_boarded / config.num_passes,
            }
        )
    return {name: round(min(run[name] for run in runs), 2) for name in runs[0]}


# ---- decode


def decode_units(num_units: int, *, full: bool) -> list[Unit]:
    """Units that hold sequences already; `full` ones have room for none more."""
    rng, units = Random(2), []
    for index in range(num_units):
        account = Account(NUM_BLOCKS)
        used = NUM_BLOCKS - 200 if full else rng.randrange(NUM_BLOCKS // 4)
        account.report(Load(rng.randrange(16, 32), 0, 0, NUM_BLOCKS - used, 0, 0))
        units.append(Unit(index, index // NUM_RANKS, account))
    return units


def taught(policy: str) -> DecodeAllocator:
    """An allocator that has seen what steps cost."""
    allocator, rng = DecodeAllocator(policy, PROFILE.max_num_seqs, BLOCK_SIZE), Random(3)
    for _ in range(100):
        ranks = decode_step(rng)
        allocator.observe(ranks, PROFILE.cost.pass_s(ranks))
    return allocator


def decode_step(rng: Random) -> list[RankWork]:
    counts = [rng.randrange(1, 64) for _ in range(NUM_RANKS)]
    return [RankWork(0, 0.0, count, count * rng.randrange(500, 2500)) for count in counts]


def measure_place(
    policy: str, num_units: int, num_ready: int, config: Config, *, full: bool = False
) -> float:
    """Microseconds for each request of rounds of `num_ready`."""
    rng = Random(4)
    samples = []
    for _ in range(config.repeats):
        allocator, clock = taught(policy), Clock()
        gc.collect()
        num_rounds = max(1, config.num_rounds * 8 // num_ready)
        units = decode_units(num_units, full=full)
        for number in range(num_rounds):
            first = number * num_ready
            ready = [
                ReadyKv(first + place, prompt_tokens(rng) // BLOCK_SIZE + 1, 16)
                for place in range(num_ready)
            ]
            if full:
                for one in ready:
                    one.num_blocks += 200
            with clock:
                placed = allocator.place(ready, units)
            assert all((index is None) == full for _, index in placed)
        samples.append(clock.us(num_rounds * num_ready))
    return round(min(samples), 2)


# ---- the small ones


def each_us(call: Callable[[], object], num_calls: int) -> float:
    start_ns = now_ns()
    for _ in range(num_calls):
        call()
    return (now_ns() - start_ns) / 1e3 / num_calls


def best_us(call: Callable[[], object], config: Config) -> float:
    samples = [each_us(call, config.num_calls) for _ in range(config.repeats)]
    return round(min(samples), 2)


def measure_small(config: Config) -> dict[str, float]:
    rng, times = Random(5), PassTimes(16 * config.num_instances)
    passes = []
    for _ in range(64):
        counts = [rng.randrange(1, BUDGET) for _ in range(NUM_RANKS)]
        works = [RankWork(n, n * n / 2) for n in counts]
        passes.append((works, PROFILE.cost.pass_s(works)))
    turns = itertools.cycle(passes)
    options, buffered = FlowOptions(4096, 1 << 22), Buffered(1000, 1_500_000)
    forecast, slo = Forecast(Wait(1.0, 0.5), 1.9, Wait(0.01, 0.01), 0.03), Slo(2.0, 0.05)
    return {
        "observe_us": best_us(lambda: times.observe(*next(turns)), config),
        "predict_us": best_us(lambda: times.predict_s(next(turns)[0]), config),
        "mean_us": best_us(lambda: times.mean_s, config),
        "judge_us": best_us(lambda: judge(options, buffered, 1500, slo, forecast), config),
    }


# ---- floors


def heap_us(num_requests: int, config: Config) -> float:
    """The first of so many taken out and another put in: the least that an order costs."""
    rng = Random(6)
    heap = [(rng.random(), number) for number in range(num_requests)]
    heapq.heapify(heap)
    return best_us(lambda: heapq.heapreplace(heap, (rng.random(), 0)), config)


def sorted_list_us(num_units: int, config: Config) -> float:
    """The first of so many units taken out and put back further behind."""
    rng = Random(7)
    line = sorted((rng.random(), number) for number in range(num_units))

    def turn() -> None:
        load, number = line[0]
        del line[bisect_left(line, (load, number))]
        insort(line, (load + rng.random(), number))

    return best_us(turn, config)


# ---- the report


def measure_floors(config: Config) -> dict[str, float]:
    print("floors")
    found = {}
    for num in (config.num_requests // 10, config.num_requests, 10 * config.num_requests):
        found[f"heap of {num}"] = heap_us(num, config)
    for num_instances in (config.num_instances, 10 * config.num_instances):
        num = num_instances * NUM_RANKS
        found[f"sorted list of {num}"] = sorted_list_us(num, config)
    for name, us in found.items():
        print(f"  {name:<40} {us:8.2f} us", flush=True)
    return found


def report_prefill(config: Config) -> dict[str, object]:
    num_ranks = config.num_instances * NUM_RANKS
    print(f"prefill, {num_ranks} ranks{'':18} push  on_pass   decide, a request   a call forecast")
    found: dict[str, object] = {}
    for admission in config.admissions:
        for num in (config.num_requests // 10, config.num_requests, 10 * config.num_requests):
            name = f"{admission}, {num} buffered"
            us = measure_dispatcher(admission, num, config)
            print(
                f"  {name:<32} {us['push_us']:7.2f} {us['on_pass_us']:8.2f}"
                f" {us['decide_us_per_request']:19.2f} {us['decide_us_per_call']:8.2f}"
                f" {us['forecast_us']:8.2f} us",
                flush=True,
            )
            found[name] = us
    return found


def report_decode(config: Config) -> dict[str, object]:
    few, num = config.num_instances * NUM_RANKS, config.num_requests
    columns = {
        "round of 1": (few, 1, False),
        "of 8": (few, 8, False),
        f"of {num}": (few, num, False),
        f"of {10 * num}": (few, 10 * num, False),
        "no room": (few, num, True),
        f"{10 * few} ranks": (10 * few, num, False),
    }
    print(f"decode, {few} ranks, a request" + "".join(f"{name:>12}" for name in columns))
    found: dict[str, object] = {}
    for policy in DECODE_ALLOCATIONS:
        us = {
            name: measure_place(policy, num_units, num_ready, config, full=full)
            for name, (num_units, num_ready, full) in columns.items()
        }
        print(f"  {policy:<27}" + "".join(f"{value:9.2f} us" for value in us.values()), flush=True)
        found[policy] = us
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of scheduling decisions.")
    parser.add_argument("--smoke", action="store_true", help="only show that it runs")
    config = SMOKE if parser.parse_args().smoke else Config()
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"other processes are busy (load {load:.1f}): expect times to be too long")
    floors = measure_floors(config)
    prefill = report_prefill(config)
    decode = report_decode(config)
    print("the small ones")
    small = measure_small(config)
    for name, us in small.items():
        print(f"  {name.removesuffix('_us'):<40} {us:8.2f} us", flush=True)
    facts = {"bench": "policy", "config": asdict(config), "machine": {"load_before": load}}
    emit(facts | {"floors": floors, "prefill": prefill, "decode": decode, "small": small})


if __name__ == "__main__":
    main()
