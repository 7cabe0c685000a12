"""The simulator against runs of vLLM with Llama 3.1 70B on H200, which no number here is from.

So many clients each send their next request when the last one has ended. Who measured does not say
how they began; here they do evenly over the time of a request, so that their prompts meet as seldom
as can be. Clients that begin together stay together, and their first tokens come later.
"""

from statistics import fmean
from typing import NamedTuple

from bench.hopper.fit import Point, front_ms, measured
from nodeserve.plan.clients import simulate_clients
from nodeserve.plan.records import Arrival, Scenario
from nodeserve.plan.simulator import simulate
from nodeserve.policy.units import DispatchOptions

FAMILY, SYSTEM, MODEL = "llama-3.1-70b-fp8-h200", "h200_sxm", "meta-llama/Llama-3.1-70B"
LOW, MOST_CLIENTS, OUTPUT = 4, 32, 1024
MOST_TPOT, MOST_TTFT = 0.05, 0.10
BUDGET, MOST_SEQS = 8192, 256  # vLLM's defaults on this device
TURNS = 4  # requests of each client


class Compared(NamedTuple):
    """Real and simulated means, in milliseconds."""

    point: Point
    ttft_ms: float
    tpot_ms: float

    @property
    def errors(self) -> tuple[float, float]:
        """Relative ones, of TTFT and TPOT."""
        return self.ttft_ms / self.point.ttft_ms - 1, self.tpot_ms / self.point.tpot_ms - 1


def points() -> list[Point]:
    """What is compared: answers of 1024 tokens, up to so many clients."""
    return [
        point
        for point in measured(SYSTEM, MODEL, "fp8")
        if point.concurrency <= MOST_CLIENTS and point.output == OUTPUT
    ]


def compare(point: Point) -> Compared:
    """Simulate one measured run: the mean of what came after each client's first request and before
    its last."""
    clients = point.concurrency
    scenario = Scenario(
        f"1m:tp{point.tp}",
        FAMILY,
        DispatchOptions("shortest-queue", budget=BUDGET, max_num_seqs=MOST_SEQS),
        noise=0.0,
        transit_s=front_ms() / 2e3,
    )
    requests = [Arrival(0.0, point.prompt, point.output)] * (TURNS * clients)
    alone = simulate(scenario, requests[:1]).duration_s
    outcome = simulate_clients(scenario, requests, clients, alone)
    served = outcome.served[clients:-clients]
    tpots = [one.tpot_s for one in served if one.tpot_s is not None]
    return Compared(point, 1e3 * fmean(one.timings.ttft_s for one in served), 1e3 * fmean(tpots))


def lines(compared: list[Compared]) -> list[str]:
    """A table, and how many are within the aims."""
    made = ["tp prompt clients     TTFT ms            TPOT ms"]
    for one in compared:
        ttft, tpot = one.errors
        tp, prompt, _, clients, ttft_ms, tpot_ms = one.point
        made.append(
            f"{tp:2} {prompt:6} {clients:7}  {ttft_ms:6.0f} {one.ttft_ms:6.0f} {ttft:+4.0%}"
            f"  {tpot_ms:6.2f} {one.tpot_ms:6.2f} {tpot:+4.0%}"
        )
    low = [one for one in compared if one.point.concurrency == LOW]
    ttfts = sum(abs(one.errors[0]) <= MOST_TTFT for one in low)
    tpots = sum(abs(one.errors[1]) <= MOST_TPOT for one in compared)
    mean = fmean(abs(one.errors[1]) for one in compared)
    made.append(f"TPOT within {MOST_TPOT:.0%}: {tpots} of {len(compared)}, mean error {mean:.1%}")
    made.append(f"TTFT within {MOST_TTFT:.0%} at {LOW} clients: {ttfts} of {len(low)}")
    return made
