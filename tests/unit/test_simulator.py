"""The discrete-event simulator: one request's stages to the microsecond, and random lives."""

import pytest

from nodeserve.plan.records import Arrival, Faults, Scenario
from nodeserve.plan.simulator import simulate
from nodeserve.policy.cost import StepCost
from nodeserve.policy.profiles import Profile
from nodeserve.policy.units import DispatchOptions
from nodeserve.types import Timings

PASS_S, STEP_S, TRANSIT_S = 0.1, 0.01, 0.002


def profile(num_kv_tokens: int = 16 * 1024, **cost: float) -> Profile:
    """Constant passes, unless `cost` says more."""
    coefficients = {
        "prefill_fix_s": PASS_S,
        "decode_fix_s": STEP_S,
        **dict.fromkeys(("token_s", "attention_s", "decode_seq_s", "kv_token_s"), 0.0),
        **cost,
    }
    return Profile(
        name="test",
        source="a test",
        cost=StepCost(**coefficients),
        noise=0.0,
        num_kv_tokens=num_kv_tokens,
        kv_bytes_per_token=1000,
        handoff_bytes_per_s=1e6,
        max_num_batched_tokens=4096,
        max_num_seqs=256,
        max_model_len=4096,
    )


def scenario(layout: str, **changes: object) -> Scenario:
    fields: dict[str, object] = {
        "profile": profile(),
        "dispatch": DispatchOptions(budget=4096),
        "transit_s": TRANSIT_S,
        **changes,
    }
    return Scenario(layout, **fields)  # type: ignore[arg-type]


def test_the_stages_of_a_request_alone() -> None:
    (served,) = simulate(scenario("1p1d"), [Arrival(1.0, 32, 5)]).served
    timings = served.timings
    assert timings.ttft_s == pytest.approx(TRANSIT_S + PASS_S + TRANSIT_S)
    pulled_s = TRANSIT_S + 32 * 1000 / 1e6  # asked for, and the bytes of two blocks
    assert served.ended_s == pytest.approx(1.0 + timings.ttft_s + pulled_s + 4 * STEP_S + TRANSIT_S)
    assert served.tpot_s == pytest.approx((served.ended_s - 1.0 - timings.ttft_s) / 4)
    assert served.outcome == "length"
    expected = Timings(0.0, TRANSIT_S, 0.0, PASS_S, TRANSIT_S, 0.0, 0.032, 32_000)
    for name in ("scheduler_wait_s", "transit_s", "device_wait_s", "prefill_s", "return_s"):
        assert getattr(timings, name) == pytest.approx(getattr(expected, name)), name
    assert timings.handoff_s == pytest.approx(0.032) and timings.handoff_bytes == 32_000
    assert (timings.prefill_worker, timings.decode_worker) == (0, 1)


def test_a_killed_instance_gives_its_requests_to_the_other() -> None:
    faults = Faults(kill_instance=0, kill_at_s=0.05)
    arrivals = [Arrival(0.001 * i, 32, 3) for i in range(8)]
    outcome = simulate(scenario("2p1d", faults=faults), arrivals)
    assert [one.outcome for one in outcome.served] == ["length"] * 8
    assert any(one.timings.num_preemptions == 1 for one in outcome.served)
