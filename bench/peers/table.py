"""The rows as text, and the figure."""

from collections.abc import Sequence

from bench.peers.summary import Row, Rung, Verdict
from bench.window.picture import Axis, Panel, draw
from nodeserve.loadgen.measure import Times

HEADINGS = (
    f"{'':20}{'goodput':>9}{'of ours':>8}{'alone':>15}{'at RATE/s, P50/P90':>24}"
    f"{'tokens/s':>13}{'start':>7}{'memory':>8}",
    f"{'':20}{'req/s':>9}{'':>8}{'TTFT':>8}{'TPOT':>7}{'TTFT':>13}{'TPOT':>11}"
    f"{'1':>7}{'16':>6}{'s':>7}{'MiB':>8}",
)
PERCENT = 100.0


def lines(rows: Sequence[Row], common_rate: float) -> list[str]:
    """The table: times in ms; "of ours" is a server's goodput over our best."""
    best = max((row.goodput for row in rows if row.ours and row.goodput), default=None)
    found = [line.replace("RATE", f"{common_rate:g}") for line in HEADINGS]
    for row in rows:
        found.append(line_of(row, common_rate, best))
        if row.failure:
            found.append(f"{'':20}  {row.failure}")
    return found + notes(rows)


def line_of(row: Row, common_rate: float, best: float | None) -> str:
    share = row.goodput / best if row.goodput is not None and best else None
    mark = {"at least": ">", "below": "<", "": ""}[row.bound]
    number = f"{row.goodput:.2f}" if row.goodput is not None else "-"
    if row.bound == "below":
        number = f"{row.rungs[0].rate:g}"
    return (
        f"{row.name:20}{mark + number:>9}{cell(share, '.2f'):>8}"
        f"{middle(row.alone, 'ttft'):>8}{middle(row.alone, 'tpot'):>7}"
        f"{both(row.at(common_rate), 'ttft'):>13}{both(row.at(common_rate), 'tpot'):>11}"
        f"{cell(row.tokens_alone, '.0f'):>7}{cell(row.tokens_together, '.0f'):>6}"
        f"{cell(row.start_s, '.1f'):>7}{cell(row.memory_mib, '.0f'):>8}"
    )


def notes(rows: Sequence[Row]) -> list[str]:
    """What makes numbers doubtful."""
    found = []
    for row in rows:
        doubts = {
            "answers shorter than asked for": row.num_short,
            "prompts counted otherwise": row.num_other_prompts,
            "requests failed or cut off": row.num_failed,
            "runs in which the client was late": row.num_late_runs,
        }
        words = [f"{number} {what}" for what, number in doubts.items() if number]
        if words:
            found.append(f"note: {row.name}: {', '.join(words)}")
    return ["", *found] if found else []


def verdict_lines(verdicts: Sequence[Verdict]) -> list[str]:
    return [
        f"{'met' if one.met else 'MISSED':7} {one.what}: "
        + (
            f"{one.ours} has {one.ratio:.2f}x of {one.peer}"
            if one.ratio is not None
            else f"nothing to compare ({one.ours or 'none of ours'}, {one.peer or 'no peer'})"
        )
        + f", aim {one.aim:g}x"
        for one in verdicts
    ]


def picture(rows: Sequence[Row], title: str) -> str:
    """As SVG: attainment against rate, a line for each server."""
    measured = [row for row in rows if row.rungs]
    widest = max(one.rate for row in measured for one in row.rungs)
    curves = {
        row.letter: [(one.rate / widest, PERCENT * one.tally.share) for one in row.rungs]
        for row in measured
    }
    panel = Panel(
        "within TTFT 500 ms and TPOT 50 ms", curves, PERCENT, Axis("requests a second", widest, "")
    )
    return draw(title, {row.letter: row.name for row in measured}, [panel], "good, %")


def cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def middle(rung: Rung | None, name: str) -> str:
    times: Times | None = getattr(rung, name) if rung else None
    return f"{1e3 * times.p50:.1f}" if times else "-"


def both(rung: Rung | None, name: str) -> str:
    times: Times | None = getattr(rung, name) if rung else None
    return f"{1e3 * times.p50:.0f}/{1e3 * times.p90:.0f}" if times else "-"
