"""What is printed and drawn, and the verdicts."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bench.goodput.arms import Arm, Duel
from bench.goodput.bracket import CLOSE, Run, surely_best
from bench.window.picture import Axis, Panel, ceiling_for, draw
from nodeserve.plan.goodput import GOAL, Tally

AIM = 0.15  # of a predicted goodput
TITLES = {
    ("split", True): ("G", "phases apart, live"),
    ("split", False): ("E", "phases apart, planned"),
    ("mixed", True): ("C", "mixed, live"),
    ("mixed", False): ("F", "mixed, planned"),
}


class Judged(NamedTuple):
    """One SLO: who won, by what the plan said and live; None: nobody surely."""

    planned: str | None
    live: str | None

    @property
    def outcome(self) -> str:
        """`right`, `wrong`, or `open` where the plan named one and these runs do not tell."""
        if self.planned == self.live:
            return "right"
        return "open" if self.live is None else "wrong"


def judged(duel: Duel) -> Judged:
    """The plan's verdict beside that of the runs."""
    winners = {True: "split", False: "mixed", None: None}
    live = surely_best({arm.kind: arm.bracket for arm in duel.arms})
    return Judged(winners[duel.verdict.disaggregate], live)


def lines(duel: Duel) -> list[str]:
    """A row for each layout."""
    return [_row(arm) for arm in duel.arms] + [f"  {_verdict(duel)}"]


def _row(arm: Arm) -> str:
    chunk = arm.settings["max_num_batched_tokens"]
    rates = [rate for rate, share in arm.bracket.curve if share >= GOAL]
    report = arm.reports[max(rates, default=min(arm.reports))]
    times = [
        f"{1e3 * one.p50:4.0f} {1e3 * one.p90:4.0f}" if one is not None else "   -    -"
        for one in (report.ttft, report.tpot)
    ]
    return (
        f"  {arm.kind:6}{arm.predicted.candidate.layout:>6}, {chunk:>4} tokens a step"
        f"{arm.predicted.goodput:9.2f}{_live(arm):>24}{100 * arm.error:+8.0f} %"
        f"    {times[0]}    {times[1]}"
    )


def _live(arm: Arm) -> str:
    """The goodput, and from where to where it lies with 95 % confidence."""
    known = arm.bracket.known
    low = f"{known.low:.2f}" if known.low > 0.0 else "?"
    high = f"{known.high:.2f}" if math.isfinite(known.high) else "?"
    return f"{known.goodput:.2f} ({low} to {high})"


def run_words(arm: Arm) -> str:
    """The last run of an arm."""
    run = arm.bracket.runs[-1]
    words = f"{arm.predicted.candidate.layout} at {run.rate:.2f}/s: {run.attained:.1%} in time"
    if run.twin is not None:
        simulated = f"{run.twin.share:.1%} simulated, {run.twin.usual:.1%} usually"
        words += f", {run.share:.1%} but for the draw ({simulated})"
    return words


HEAD = (
    f"{'':34}{'planned':>9}{'live (95 %)':>24}{'error':>10}"
    "    TTFT p50 p90  TPOT p50 p90, ms, at the highest rate that attains"
)


def _verdict(duel: Duel) -> str:
    found = judged(duel)
    names = {"mixed": "do not disaggregate", "split": "disaggregate", None: "no clear winner"}
    return f"planned: {names[found.planned]}; live: {names[found.live]}"


def aims(duels: Sequence[Duel]) -> list[tuple[str, bool]]:
    """What the plan must have known."""
    found = [judged(duel) for duel in duels]
    arms = [arm for duel in duels for arm in duel.arms]
    worst = max(arms, key=lambda arm: abs(arm.error))
    num_close = sum(arm.bracket.known.is_close for arm in arms)
    outcomes = Counter(one.outcome for one in found)
    return [
        (
            f"the winner under every SLO: {outcomes['right']} of {len(found)} right,"
            f" {outcomes['wrong']} wrong, {outcomes['open']} that these runs do not tell",
            outcomes["right"] == len(found),
        ),
        (
            f"goodput within {AIM:.0%}: at most {worst.error:+.0%} ({worst.kind},"
            f" {_errors(worst)} by the error of the live one)",
            abs(worst.error) <= AIM,
        ),
        (
            f"each live goodput known to {CLOSE:.0%}: {num_close} of {len(arms)}",
            num_close == len(arms),
        ),
    ]


def _errors(arm: Arm) -> str:
    """Those that the error of the live goodput allows."""
    known, planned = arm.bracket.known, arm.predicted.goodput
    low = f"{planned / known.high - 1.0:+.0%}" if math.isfinite(known.high) else "any less"
    high = f"{planned / known.low - 1.0:+.0%}" if known.low > 0.0 else "any more"
    return f"{low} to {high}"


def values(duel: Duel) -> dict[str, object]:
    """For the JSON line: rates in requests a second; null beyond those that were run."""
    found = judged(duel)
    return {
        "slo": duel.title,
        "planned_winner": found.planned,
        "live_winner": found.live,
        "outcome": found.outcome,
        "reason": duel.verdict.reason,
        "arms": [_arm_values(arm) for arm in duel.arms],
    }


def _arm_values(arm: Arm) -> dict[str, object]:
    predicted, known = arm.predicted, arm.bracket.known
    return {
        "kind": arm.kind,
        **arm.settings,
        "planned": round(predicted.goodput, 3),
        "planned_low": round(predicted.low, 3),
        "planned_high": predicted.high and round(predicted.high, 3),
        "planned_curve": _curve((one.rate, one.tally) for one in predicted.probes),
        "live": round(known.goodput, 3),
        "live_low": round(known.low, 3) or None,
        "live_high": round(known.high, 3) if math.isfinite(known.high) else None,
        "curve": _curve(arm.bracket.tallies),
        "runs": [_run_values(run) for run in arm.bracket.runs],
        "most_foreign": round(arm.foreign, 4),
    }


def _run_values(run: Run) -> dict[str, float]:
    """Of one live run, as shares: attained, and what the same requests attain in the simulator, and
    others usually there."""
    values = {"rate": run.rate, "attained": run.attained}
    if run.twin is not None:
        values |= {"simulated": run.twin.share, "simulated_usually": run.twin.usual}
    return {name: round(value, 4) for name, value in values.items()}


def _curve(tallies: Iterable[tuple[float, Tally]]) -> list[list[float]]:
    """[Rate, good, offered], by rate."""
    return [
        [round(rate, 3), tally.num_good, tally.num_offered]
        for rate, tally in sorted(tallies, key=lambda one: one[0])
    ]


def picture(duels: Sequence[Duel]) -> str:
    """As SVG: attainment against rate, planned and live, a panel for each SLO."""
    panels = []
    for duel in duels:
        curves = {}
        for arm in duel.arms:
            probes = [(one.rate, one.tally.share) for one in arm.predicted.probes]
            curves[TITLES[arm.kind, False][0]] = probes
            curves[TITLES[arm.kind, True][0]] = arm.bracket.curve
        widest = ceiling_for([rate for arm in duel.arms for rate, _ in arm.bracket.curve])
        scaled = {
            letter: [(rate / widest, 100 * share) for rate, share in curve if rate <= widest]
            for letter, curve in curves.items()
        }
        axis = Axis("requests a second", widest, "")
        panels.append(Panel(f"limits {duel.title} ms", scaled, 100.0, axis))
    title = "Requests within both limits, as planned and on this machine"
    return draw(title, dict(TITLES.values()), panels, "attained, %")
