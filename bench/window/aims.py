"""What was aimed at, and whether it was met."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bench.window.compare import Compared
from bench.window.grid import IMMEDIATE, SHAPES, WORKLOAD, Point
from bench.window.stats import Ratio, pairs_ratio
from nodeserve.policy.dispatcher import MIN_SILENCE_S, SILENCE_PASSES
from nodeserve.policy.window import MAX_AGE_PASSES

WANTED_MEAN, WANTED_MEAN_HIGH = 0.70, 0.80  # at 60 % load, 4x8: ratio, upper end of its interval
WANTED_QPS = 1.20
WORSE = 1.02
SMALL_DEVICE_WAIT = 0.05  # of a request's time to first token: "near zero"
HEADLINE = Point(SHAPES[0], *WORKLOAD, 0.6)


@dataclass(frozen=True, slots=True)
class Aim:
    """`met` is None where this run has not what it takes to say."""

    name: str
    wanted: str
    found: str
    met: bool | None

    def __str__(self) -> str:
        verdict = {True: "met", False: "MISSED", None: "not run"}[self.met]
        return f"{verdict:8}{self.name}: wanted {self.wanted}; found {self.found}"


@dataclass(frozen=True, slots=True)
class Violation:
    """G is worse than an arm by more than it may be. `sure`: the whole interval is above it."""

    point: str
    arm: str
    ratio: Ratio

    @property
    def sure(self) -> bool:
        return self.ratio.low > WORSE

    def __str__(self) -> str:
        mark = "" if self.sure else "  (interval reaches below the bound)"
        value, low, high = self.ratio
        return f"{self.point}: {value:.3f} [{low:.3f}, {high:.3f}] of {self.arm}{mark}"


def violations(compared: Iterable[Compared]) -> list[Violation]:
    """Every point and arm where mean TTFT is worse by more than 2 %, worst first."""
    found = [
        Violation(str(one.point), arm, ratio)
        for one in compared
        for arm, ratio in one.against.items()
        if ratio.value > WORSE
    ]
    return sorted(found, key=lambda violation: -violation.ratio.value)


def check(
    compared: Sequence[Compared], rates: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]
) -> list[Aim]:
    """All aims of a run. `rates`: for each shape and arm, for each seed the highest rates that
    meet the two limits."""
    by_point = {one.point: one for one in compared}
    return [
        *_ttft(by_point.get(HEADLINE)),
        *_rates(rates.get(str(HEADLINE.shape), {})),
        _never_worse(compared),
        _signature(by_point.get(HEADLINE)),
        _lost(compared),
        _idle(compared),
    ]


def _ttft(one: Compared | None) -> list[Aim]:
    mean, tail = f"mean TTFT, {HEADLINE}", f"P99 TTFT, {HEADLINE}"
    wanted = f"ratio <= {WANTED_MEAN}, interval below {WANTED_MEAN_HIGH}"
    if one is None:
        return [Aim(mean, wanted, "-", None), Aim(tail, "ratio <= 1", "-", None)]
    fits = one.mean.value <= WANTED_MEAN and one.mean.high < WANTED_MEAN_HIGH
    return [
        Aim(mean, wanted, f"{shown(one.mean)} of {one.best}", fits),
        Aim(tail, "ratio <= 1", f"{shown(one.p99)} of {one.best}", one.p99.value <= 1),
    ]


def rate_ratios(of_shape: Mapping[str, Sequence[tuple[float, float]]]) -> list[tuple[str, Ratio]]:
    """For both limits: the immediate arm with the highest rate, and G's rate over its."""
    ratios = []
    for limit in (0, 1):
        rates = {arm: [one[limit] for one in seeds] for arm, seeds in of_shape.items()}
        best = max((arm for arm in IMMEDIATE if arm in rates), key=lambda arm: sum(rates[arm]))
        ratios.append((best, pairs_ratio(rates["G"], rates[best])))
    return ratios


def _rates(of_shape: Mapping[str, Sequence[tuple[float, float]]]) -> list[Aim]:
    wanted = f"ratio >= {WANTED_QPS}"
    names = [f"QPS at a limit of {what} TTFT, {HEADLINE.shape}" for what in ("mean", "P99")]
    if not of_shape:
        return [Aim(name, wanted, "-", None) for name in names]
    return [
        Aim(name, wanted, f"{shown(ratio)} of {best}", ratio.value >= WANTED_QPS)
        for name, (best, ratio) in zip(names, rate_ratios(of_shape), strict=True)
    ]


def _never_worse(compared: Sequence[Compared]) -> Aim:
    found = violations(compared)
    sure = sum(violation.sure for violation in found)
    checks = sum(len(one.against) for one in compared)
    text = f"{len(found)} of {checks} comparisons above it, {sure} with their whole interval"
    return Aim("G against every arm at every point", f"ratio <= {WORSE}", text, not found)


def _signature(one: Compared | None) -> Aim:
    name, wanted = f"device wait, {HEADLINE}", f"<= {SMALL_DEVICE_WAIT:.0%} of TTFT"
    if one is None:
        return Aim(name, wanted, "-", None)
    shares = {arm: one.measures[arm]["device_wait_s"] / one.measures[arm]["mean_s"] for arm in "CG"}
    text = f"{shares['G']:.1%} (C: {shares['C']:.0%})"
    return Aim(name, wanted, text, shares["G"] <= SMALL_DEVICE_WAIT)


def _lost(compared: Sequence[Compared]) -> Aim:
    lost = sum(sum(one.num_lost.values()) for one in compared)
    killed = sum(one.point.shape.instances > 1 for one in compared)
    text = f"{lost} (an instance died at {killed} of {len(compared)} points)"
    return Aim("lost requests, H and all other arms", "none", text, not lost)


def _idle(compared: Sequence[Compared]) -> Aim:
    """No request is left in the buffer for long while an instance could take it."""
    waits = [
        (one.measures[arm]["idle_wait_s"] / bound_s(one, arm), one, arm)
        for one in compared
        for arm in "GH"
    ]
    share, one, arm = max(waits, key=lambda wait: wait[0])
    found = f"at most {one.measures[arm]['idle_wait_s']:.2f} s of {bound_s(one, arm):.2f} s"
    text = f"{found} ({arm}, {one.point})"
    return Aim("wait beside an idle instance, G and H", "within the bound", text, share <= 1)


def bound_s(one: Compared, arm: str) -> float:
    """How long a request may wait while an instance is idle. Nobody waits for the timer for longer
    than MAX_AGE_PASSES; an instance whose report was lost passes for busy until the watchdog asks
    it, or, where all others do too, until nobody has been heard of for the time of silence."""
    pass_s = one.measures[arm]["pass_s"]
    if arm == "H":
        return max(SILENCE_PASSES * pass_s, MIN_SILENCE_S)
    return MAX_AGE_PASSES * pass_s


def shown(ratio: Ratio) -> str:
    return f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
