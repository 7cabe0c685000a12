"""Which requests are meant: the options that `nodeserve bench` and `nodeserve plan` share."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from nodeserve.errors import ConfigError
from nodeserve.plan.named import NAMED
from nodeserve.plan.requests import Source

Command = TypeVar("Command", bound=Callable[..., Any])

WORKLOAD = "chat"  # unless another, or a trace, is asked for
SOURCE_OPTIONS = (
    click.option(
        "--workload",
        help=f"{', '.join(NAMED)}, or synthetic(IN,OUT). [default: {WORKLOAD}]",
    ),
    click.option(
        "--trace",
        type=click.Path(path_type=Path),
        help="CSV file with arrival_s,input_tokens,output_tokens instead.",
    ),
    click.option("--arrivals", help="poisson, or gamma:CV. [default: the workload's own]"),
    click.option("--seed", type=int, default=0, show_default=True, help="Of requests and noise."),
    click.option("--scale-lengths", type=float, default=1.0, help="Divide all lengths by this."),
    click.option("--thin", type=float, default=1.0, help="Keep this share of the requests."),
    click.option(
        "--spread-ticks", type=float, help="Spread a trace's timestamps over so many seconds."
    ),
    click.option("--window", help="FROM:TO, seconds of the trace that are used."),
    click.option(
        "--max-model-len",
        type=click.IntRange(min=2),
        help="Leave out longer requests. [default: the server's, or the profile's]",
    ),
)


def source_options(command: Command) -> Command:
    for option in reversed(SOURCE_OPTIONS):
        command = option(command)
    return command


def source_of(options: dict[str, Any]) -> Source:
    """ConfigError for options of the other kind of source: they would do nothing."""
    of_traces = ("spread_ticks", "window")
    for name in of_traces if options["trace"] is None else ("workload", "arrivals"):
        if options[name] is not None:
            kind = "workloads, and --trace has its own times" if options["trace"] else "a --trace"
            if name == "workload":
                raise ConfigError("--workload and --trace both say what is sent: use one of them")
            raise ConfigError(f"--{name.replace('_', '-')} is for {kind}: leave one of them out")
    begin_s, end_s = parse_span(options["window"])
    return Source(
        workload=options["workload"] or WORKLOAD,
        trace=options["trace"],
        gaps=options["arrivals"],
        divisor=options["scale_lengths"],
        share=options["thin"],
        tick_s=options["spread_ticks"],
        from_s=begin_s,
        to_s=end_s,
        seed=options["seed"],
    )


def parse_span(text: str | None) -> tuple[float, float]:
    if text is None:
        return 0.0, math.inf
    begin, _, end = text.partition(":")
    try:
        span = float(begin or 0.0), float(end or math.inf)
    except ValueError:
        span = math.inf, 0.0
    if not 0.0 <= span[0] < span[1]:
        raise ConfigError(f"--window {text}: use FROM:TO in seconds, such as 810:1410")
    return span


def source_words(source: Source) -> str:
    """Which requests, for a heading."""
    words = [str(source.trace or source.workload)]
    if source.divisor != 1.0:
        words.append(f"lengths / {source.divisor:g}")
    if source.share != 1.0:
        words.append(f"{source.share:.0%} of the requests")
    return ", ".join(words)


def dropped_words(share: float) -> str:
    """What is said of requests that were longer than the context."""
    return f"{share:.1%} of the requests do not fit and were left out"
