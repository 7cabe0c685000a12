"""A node of simulated GPUs in real time, and the simulator: the same trace takes the same time.

Passes last hundreds of milliseconds, so that what the machine adds to them hardly counts. Both
sides draw the same noise for a pass of the same number.
"""

from collections.abc import Iterator
from itertools import combinations

import pytest

from nodeserve import AsyncClient
from nodeserve.loadgen.fleet import Fleet
from nodeserve.loadgen.targets import TargetOptions
from nodeserve.plan.records import Arrival, Scenario
from nodeserve.plan.simulator import simulate
from nodeserve.plan.workloads import Workload, generate, parse_lengths
from nodeserve.policy.profiles import profile_named
from nodeserve.policy.units import DispatchOptions
from tests.process.conftest import Nodes

pytestmark = [pytest.mark.slow, pytest.mark.alone]

LAYOUT, PROFILE, SEED = "2p:ep2,1d:ep2", "moe-ep8", 1
ARMS = ("round-robin", "shortest-queue", "staggered")
RATE, NUM_REQUESTS = 9.0, 63  # half of what the layout can serve, for seven seconds
TRANSITS_S = (0.0002, 0.0005, 0.001, 0.002)  # a ring and two wake-ups, on an idle or a busy machine
DRAIN_S = 50.0
TEAM_SHARE = 0.4  # of these requests, for an instance of four workers
AGREES = 0.10


def trace(share: float = 1.0) -> list[Arrival]:
    """`share` of the requests, and of their rate."""
    prompt, output = parse_lengths("lognormal:1500"), parse_lengths("3")
    workload = Workload(share * RATE, round(share * NUM_REQUESTS), prompt, output, seed=SEED)
    return generate(workload, profile_named(PROFILE).max_model_len)


def predicted_ttft_s(admission: str, layout: str = LAYOUT, share: float = 1.0) -> float:
    """Over several transits, since a decision may turn on a millisecond that nobody knows."""
    profile = profile_named(PROFILE)
    dispatch = DispatchOptions(
        admission, budget=profile.max_num_batched_tokens, max_num_seqs=profile.max_num_seqs
    )
    times_s = [
        one.timings.ttft_s
        for transit_s in TRANSITS_S
        for one in simulate(
            Scenario(layout, PROFILE, dispatch, seed=SEED, transit_s=transit_s), trace(share)
        ).served
    ]
    return sum(times_s) / len(times_s)


async def measured_ttft_s(
    nodes: Nodes, admission: str, layout: str = LAYOUT, share: float = 1.0
) -> float:
    node = nodes.start(layout=layout, device="sim", profile=PROFILE, seed=SEED, admission=admission)
    async with Fleet(TargetOptions(socket=str(node.socket))) as fleet:
        seen = await fleet.run(trace(share), drain_s=DRAIN_S)
    async with AsyncClient(node.socket) as client:
        await client.stop_server()
    node.wait()
    timings = [one.timings for one in seen.samples if one.timings is not None]
    assert len(timings) == len(seen.samples), {one.error for one in seen.samples}
    return sum(one.ttft_s for one in timings) / len(timings)


def ordered(means: dict[str, float], far_apart: float) -> Iterator[tuple[str, str]]:
    """Pairs of arms, the faster first, whose means differ by more than this share."""
    for pair in combinations(means, 2):
        faster, slower = sorted(pair, key=means.__getitem__)
        if means[slower] > (1.0 + far_apart) * means[faster]:
            yield faster, slower


async def test_live_and_simulated_times_to_first_token_agree(nodes: Nodes) -> None:
    predicted = {admission: predicted_ttft_s(admission) for admission in ARMS}
    measured = {admission: await measured_ttft_s(nodes, admission) for admission in ARMS}
    for admission in ARMS:
        assert measured[admission] == pytest.approx(predicted[admission], rel=AGREES), admission
    told_apart = list(ordered(predicted, AGREES))
    assert ("staggered", "round-robin") in told_apart
    for faster, slower in told_apart:
        assert measured[faster] < measured[slower], (faster, slower)


TEAMS = ["1p:tp4,1d:tp2", "1p:pp4,1d:pp4", "1m:tp2.pp2", "1m:pp2.ep2"]


@pytest.mark.parametrize("layout", TEAMS)
async def test_live_and_simulated_teams_agree(nodes: Nodes, layout: str) -> None:
    """Teams take the time of their shape, with stages under way at once, on both sides."""
    predicted = predicted_ttft_s("staggered", layout, TEAM_SHARE)
    measured = await measured_ttft_s(nodes, "staggered", layout, TEAM_SHARE)
    assert measured == pytest.approx(predicted, rel=AGREES)
