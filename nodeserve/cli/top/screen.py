"""How a frame looks on a terminal: lines of text of a given width. Pure; 80x24 shows a node of
eight workers whole."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rich.text import Text

from nodeserve.views import Frame, Quantiles, Span, Worker
from nodeserve.views.verdict import FULL, GOAL, words_of

LEVELS = "▁▂▃▄▅▆▇█"
EIGHTHS = " ▏▎▍▌▋▊▉█"
PLAIN = str.maketrans("▁▂▃▄▅▆▇█▏▎▍▌▋▊▉·", "_.-=+*##:::||||.")  # where there is no UTF-8
NONE = "-"
NAME_WIDTH, NUMBER_WIDTH = 12, 8
BAR_WIDTH = 9
HEAD_LINES = 14  # above the workers
KEYS = "q quit  p pause  s sort: {}  r reverse  up/down scroll"

SORTS: dict[str, Callable[[Worker], float | str]] = {  # numbers are shown largest first
    "id": lambda one: f"{one.index:6}",
    "role": lambda one: f"{one.role} {one.index:6}",
    "batch": lambda one: one.running,
    "KV": lambda one: one.kv_use,
    "busy": lambda one: one.busy or 0.0,
    "step": lambda one: one.step_ms,
    "queue": lambda one: one.waiting_tokens,
}


@dataclass(frozen=True, slots=True)
class Choice:
    """What the person at the terminal wants."""

    sort: str = "id"
    reverse: bool = False
    scroll: int = 0
    paused: bool = False

    def after(self, key: str) -> "Choice":
        """What a key makes of it; keys that mean nothing change nothing."""
        names = list(SORTS)
        match key:
            case "p" | " ":
                return replace(self, paused=not self.paused)
            case "s":
                following = names[(names.index(self.sort) + 1) % len(names)]
                return replace(self, sort=following, reverse=False, scroll=0)
            case "r":
                return replace(self, reverse=not self.reverse)
            case "up" | "k":
                return replace(self, scroll=max(0, self.scroll - 1))
            case "down" | "j":
                return replace(self, scroll=self.scroll + 1)
        return self

    def within(self, num_workers: int, height: int) -> "Choice":
        """Scrolled no further than to the last worker."""
        return replace(self, scroll=min(self.scroll, max(0, num_workers - room_of(height))))


def room_of(height: int) -> int:
    """How many workers are shown; a line is for the keys."""
    return max(1, height - HEAD_LINES - 1)


def lines_of(
    frame: Frame, choice: Choice, width: int, height: int | None, trouble: str = ""
) -> list[Text]:
    """The whole picture. With `height`, exactly as many lines: workers that do not fit are counted
    in the last line, which has the keys. `trouble`: why there is no newer frame."""
    head = [
        title(frame, choice, width),
        Text(trouble, "bold red") if trouble else verdict(frame),
        Text(),
        *spans(frame, width),
        Text(),
        *facts(frame),
        Text(),
        heading(),
    ]
    rows = [row(one) for one in ordered(frame.workers, choice)]
    if height is not None:
        room, first = room_of(height), choice.within(len(rows), height).scroll
        shown = rows[first : first + room]
        hidden = f"  {first + 1}-{first + len(shown)} of {len(rows)}" if len(rows) > room else ""
        blank = [Text() for _ in range(room - len(shown))]
        rows = [*shown, *blank, Text(KEYS.format(choice.sort) + hidden, "dim")]
        head = head[: max(0, height - len(rows))]
    for line in (lines := [*head, *rows]):
        line.truncate(width)
    return lines


def plain(lines: Sequence[Text]) -> None:
    """In place, without characters that need UTF-8."""
    for line in lines:
        line.plain = line.plain.translate(PLAIN)


# ---- the node


def title(frame: Frame, choice: Choice, width: int) -> Text:
    running = f"up {clock(frame.uptime_s)}  loop lag {frame.loop_lag_ms:.0f} ms"
    left = Text.assemble((frame.model, "bold"), f"  {frame.layout}  ", (running, "dim"))
    state = "paused" if choice.paused else frame.state
    colour = {"ready": "green", "degraded": "yellow", "paused": "reverse"}.get(state, "red")
    left.truncate(max(0, width - len(state) - 2))
    left.append(" " * (width - len(state) - left.cell_len))
    return left.append(state, colour)


def clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def verdict(frame: Frame) -> Text:
    shares = [span.attainment for span in frame.spans if span.attainment is not None]
    colour = "" if not shares else "green" if shares[0] >= GOAL else "yellow"
    if frame.state not in ("ready", "degraded"):
        colour = "red"
    return Text(frame.verdict, f"bold {colour}".strip())


def spans(frame: Frame, width: int) -> list[Text]:
    """A line for each thing that has a goal: now, lately, and its curve."""
    series, room = frame.series, max(0, width - NAME_WIDTH - NUMBER_WIDTH * len(frame.spans) - 2)
    covered_s = min(room, len(series.attainment)) * series.step_s
    heads = "".join(f"{words_of(span.seconds):>{NUMBER_WIDTH}}" for span in frame.spans)
    lines = [Text(f"{'':<{NAME_WIDTH}}{heads}  the last {covered_s} s", "dim")]
    for name, cell, points, highest in (
        ("attainment", attainment, series.attainment, 1.0),
        ("goodput/s", goodput, series.goodput_per_s, None),
        ("TTFT p90 ms", lambda span: p90(span.ttft_ms), series.ttft_p90_ms, None),
        ("TPOT p90 ms", lambda span: p90(span.tpot_ms), series.tpot_p90_ms, None),
    ):
        line = Text(f"{name:<{NAME_WIDTH}}")
        for span in frame.spans:
            line.append_text(cell(span))
        lines.append(
            line.append("  ").append(spark(points[-room:] if room else (), highest), "cyan")
        )
    return lines


def number(text: str, style: str = "") -> Text:
    return Text(f"{text:>{NUMBER_WIDTH}}", style)


def attainment(span: Span) -> Text:
    share = span.attainment
    if share is None:
        return number(NONE, "dim")
    return number(f"{share:.0%}", "green" if share >= GOAL else "yellow" if share > 0.5 else "red")


def goodput(span: Span) -> Text:
    return number(brief(span.goodput_per_s))


def p90(times: Quantiles | None) -> Text:
    return number(NONE, "dim") if times is None else number(brief(times.p90))


def brief(value: float) -> str:
    """Three digits or so, and at most seven characters."""
    if value >= 1e7:
        return f"{value / 1e6:,.0f}M"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def spark(points: Sequence[float | None], highest: float | None) -> str:
    """A character for each point, up to the highest of them unless that is given."""
    top = highest or max((one for one in points if one is not None), default=0.0) or 1.0
    last = len(LEVELS) - 1
    return "".join(
        " " if one is None else LEVELS[min(last, max(0, round(one / top * last)))] for one in points
    )


def facts(frame: Frame) -> list[Text]:
    admission, handoff = frame.admission, frame.handoff
    queue = [f"{admission.queued:,} ({admission.queued_tokens:,} tokens)"]
    queue += [f"{admission.parked:,} parked", leaving(frame)]
    passes = [
        unknown(admission.pass_ms, "{:.0f} ms"),
        unknown(admission.fill, "{:.0%} filled"),
        unknown(admission.balance, "balance {:.2f}"),
        unknown(handoff.per_s, "{:.0f} handoffs/s"),
        unknown(handoff.gb_per_s, "{:.1f} GB/s"),
    ]
    span = next((one for one in frame.spans if one.missed), frame.spans[0])
    missed = ", ".join(f"{word} {count:,}" for word, count in span.missed.items())
    within = f"in {words_of(span.seconds)}: " if missed else ""
    return [
        fact("queue", queue),
        fact("passes", passes),
        fact("misses", [f"{within}{missed or 'none'}"]),
    ]


def leaving(frame: Frame) -> str:
    admission = frame.admission
    words = "no window" if admission.falling_back else admission.name
    if admission.window_ms and not admission.falling_back:
        words += f" {admission.window_ms:.0f} ms"
    rate = admission.departures_per_s
    return words if rate is None else f"{words}, {rate:.0f} departures/s"


def fact(name: str, parts: Sequence[str]) -> Text:
    return Text.assemble(
        (f"{name:<{NAME_WIDTH}}", "dim"), "  ".join(part for part in parts if part)
    )


def unknown(value: float | None, words: str) -> str:
    return "" if value is None else words.format(value)


# ---- workers


def heading() -> Text:
    names = (
        "id",
        "role",
        "state",
        "batch",
        "wait",
        "pin",
        "KV",
        "busy",
        "step ms",
        "tok/s",
        "queue",
    )
    return Text(WORKER_ROW.format(*names), "bold")


WORKER_ROW = "{:<4}{:<9}{:<10}{:>6}{:>5}{:>4}  {:<14}{:>5}{:>8}{:>7}{:>6}"
FOLLOWER_ROW = "{:<4}{:<9}{:<10}  computes with w{}"


def row(worker: Worker) -> Text:
    role = worker.role if worker.acting == worker.role else f"{worker.role}+"
    if not worker.leads:
        words = FOLLOWER_ROW.format(f"w{worker.index}", role, worker.state[:9], worker.leader)
        return Text(words, "dim" if worker.state == "ready" else "red")
    rate = worker.tokens_per_s if worker.acting != "prefill" else worker.prompt_tokens_per_s
    bar = bar_of(worker.kv_use)
    text = WORKER_ROW.format(
        *(
            f"w{worker.index}",
            role,
            worker.state[:9],
            worker.running,
            worker.waiting,
            worker.pinned,
        ),
        f"{bar} {worker.kv_use:>4.0%}",
        NONE if worker.busy is None else f"{worker.busy:.0%}",
        *(f"{worker.step_ms:.1f}", short(rate), short(worker.waiting_tokens)),
    )
    line = Text(text, "" if worker.state == "ready" else "red")
    start = text.index(bar)
    line.stylize("red" if worker.kv_use >= FULL else "cyan", start, start + BAR_WIDTH)
    return line


def bar_of(share: float) -> str:
    """Of BAR_WIDTH characters, an eighth of one exact."""
    eighths = round(min(1.0, max(0.0, share)) * BAR_WIDTH * 8)
    whole, rest = divmod(eighths, 8)
    filled = EIGHTHS[8] * whole + (EIGHTHS[rest] if rest else "")
    return filled.ljust(BAR_WIDTH, "·")


def short(value: float) -> str:
    """At most five characters."""
    if value >= 1e6:
        return f"{value / 1e6:.1f}M"
    return f"{value / 1e3:.1f}k" if value >= 1e4 else f"{value:.0f}"


def ordered(workers: Sequence[Worker], choice: Choice) -> list[Worker]:
    key = SORTS[choice.sort]
    falling = choice.sort not in ("id", "role")
    return sorted(workers, key=key, reverse=falling != choice.reverse)
