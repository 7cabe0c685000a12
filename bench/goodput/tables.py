"""What is printed and drawn, and the verdicts."""

from collections.abc import Sequence
from typing import NamedTuple

from bench.goodput.arms import Arm, Duel
from bench.goodput.bracket import clear_winner
from bench.window.picture import Axis, Panel, draw
from nodeserve.plan.goodput import GOAL

APART = 0.05  # goodputs that differ by less are no win
AIM = 0.15  # of a predicted goodput
TITLES = {
    ("split", True): ("G", "phases apart, live"),
    ("split", False): ("E", "phases apart, planned"),
    ("mixed", True): ("C", "mixed, live"),
    ("mixed", False): ("F", "mixed, planned"),
}


class Judged(NamedTuple):
    """One SLO: who won, planned and live; None: nobody clearly."""

    planned: str | None
    live: str | None

    @property
    def agree(self) -> bool:
        """Where nobody won clearly, there was nothing to know."""
        return self.live is None or self.planned == self.live


def judged(duel: Duel) -> Judged:
    """By the goodputs of both arms: 0 where no rate attains, the highest rate where all do."""
    planned = clear_winner({arm.kind: arm.predicted.goodput for arm in duel.arms}, APART)
    live = clear_winner({arm.kind: arm.bracket.goodput for arm in duel.arms}, APART)
    return Judged(planned, live)


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
        f"{arm.predicted.goodput:9.2f}{arm.bracket.goodput:9.2f}{100 * arm.error:+8.0f} %"
        f"    {times[0]}    {times[1]}"
    )


HEAD = (
    f"{'':34}{'planned':>9}{'live':>9}{'error':>10}"
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
    unbracketed = sum(not arm.bracket.bracketed for arm in arms)
    return [
        (
            f"the winner under every SLO: {sum(one.agree for one in found)} of {len(found)},"
            f" {sum(one.live is not None for one in found)} of them clear",
            all(one.agree for one in found),
        ),
        (
            f"goodput within {AIM:.0%}: at most {worst.error:+.0%} ({worst.kind})",
            abs(worst.error) <= AIM,
        ),
        (f"a rate below and one above each goodput: {unbracketed} without", not unbracketed),
    ]


def values(duel: Duel) -> dict[str, object]:
    """For the JSON line: rates in requests a second."""
    found = judged(duel)
    return {
        "slo": duel.title,
        "planned_winner": found.planned,
        "live_winner": found.live,
        "reason": duel.verdict.reason,
        "arms": [
            {
                "kind": arm.kind,
                **arm.settings,
                "planned": round(arm.predicted.goodput, 3),
                "planned_low": round(arm.predicted.low, 3),
                "planned_high": arm.predicted.high and round(arm.predicted.high, 3),
                "live": round(arm.bracket.goodput, 3),
                "curve": [
                    [round(rate, 3), tally.num_good, tally.num_offered]
                    for rate, tally in sorted(arm.bracket.tallies.items())
                ],
            }
            for arm in duel.arms
        ],
    }


def picture(duels: Sequence[Duel]) -> str:
    """As SVG: attainment against rate, planned and live, a panel for each SLO."""
    panels = []
    for duel in duels:
        curves = {}
        for arm in duel.arms:
            probes = [(one.rate, one.tally.share) for one in arm.predicted.probes]
            curves[TITLES[arm.kind, False][0]] = probes
            curves[TITLES[arm.kind, True][0]] = arm.bracket.curve
        widest = 1.05 * max(rate for arm in duel.arms for rate, _ in arm.bracket.curve)
        scaled = {
            letter: [(rate / widest, 100 * share) for rate, share in curve if rate <= widest]
            for letter, curve in curves.items()
        }
        axis = Axis("requests a second", widest, "")
        panels.append(Panel(f"limits {duel.title} ms", scaled, 100.0, axis))
    title = "Requests within both limits, as planned and on this machine"
    return draw(title, dict(TITLES.values()), panels, "attained, %")
