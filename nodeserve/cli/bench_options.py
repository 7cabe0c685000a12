"""The options of `nodeserve bench`, and what they mean for the load generator."""

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from nodeserve.cli.sources import WORKLOAD, source_options
from nodeserve.errors import ConfigError
from nodeserve.loadgen.bench import BenchOptions
from nodeserve.loadgen.limits import Limits, limits_of, parse_limits
from nodeserve.loadgen.targets import APIS, TargetOptions
from nodeserve.plan.goodput import CONFIDENCE, GOAL, MAX_CONFIDENCE
from nodeserve.plan.named import workload_named
from nodeserve.plan.requests import Source
from nodeserve.plan.search import SearchOptions

Command = TypeVar("Command", bound=Callable[..., Any])

KEY_VARIABLE = "OPENAI_API_KEY"
LIMIT = "--goodput"
TOLERANCE, MAX_REQUESTS = 0.05, 3200  # of a search
OF_SEARCHES = ("min_rate", "max_rate", "tolerance", "max_requests")
OF_URLS = ("model", "tokenizer", "text")
FLOOR = 16.0  # a search goes down to this part of its first rate


class BenchCommand(click.Command):
    """Lets `--goodput ttft:200 tpot:50` take several words, as vLLM's benchmark does."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spread: list[str] = []
        for word in args:
            more = len(spread) > 1 and spread[-2] == LIMIT and ":" in word
            spread += [LIMIT, word] if more and not word.startswith("-") else [word]
        return super().parse_args(ctx, spread)


def _option(*names: str, **how: Any) -> Callable[[Command], Command]:
    return click.option(*names, **how)


OPTIONS = (
    _option(
        "--url",
        help="OpenAI-compatible server, such as http://127.0.0.1:8000; needs nodeserve[bench].",
    ),
    _option("--socket", help="Path of a node's Unix socket. [default: the usual one]"),
    _option("--api", type=click.Choice(APIS), default="completions", show_default=True),
    _option("--model", help="Name for --url. [default: the first that the server lists]"),
    _option("--tokenizer", help="Folder or .gguf file, to write texts of exact length."),
    _option("--text", is_flag=True, help="Send completions texts instead of token ids."),
    _option(
        "--vocab-size",
        type=click.IntRange(min=1),
        help="Token ids are below it. [default: the server's]",
    ),
    _option("--stop-at-eos", is_flag=True, help="Do not force the lengths of outputs."),
    _option("--extra-body", help="JSON object whose fields go into every request of --url."),
    _option("--requests", type=click.IntRange(min=1), help="How many. [default: 200, or by time]"),
    _option("--duration", type=float, help="Seconds of requests, as many as that takes."),
    _option("--rate", help="Requests a second. [default for traces: their own]"),
    _option("--concurrency", type=click.IntRange(min=1), help="Closed loop: so many at once."),
    _option("--sweep", help="RATE,RATE,...: one run for each."),
    _option("--find-goodput", is_flag=True, help="Search the highest rate that is good enough."),
    _option(
        LIMIT,
        multiple=True,
        help="Limits in ms, as ttft:200 tpot:50 e2el:9000, or as multiples of an idle server's"
        " times, as ttft:5x tpot:2x. [default: the workload's]",
    ),
    _option("--min-rate", type=float, help="Search no lower. [default: a 16th of the first rate]"),
    _option("--max-rate", type=float, help="Search no higher."),
    _option("--goal", type=float, default=GOAL, show_default=True, help="Share of good requests."),
    _option("--confidence", type=float, default=CONFIDENCE, show_default=True),
    _option("--tolerance", type=float, help=f"Of the search. [default: {TOLERANCE}]"),
    _option(
        "--max-requests",
        type=click.IntRange(min=1),
        help=f"Of one probe of a search. [default: {MAX_REQUESTS}]",
    ),
    _option("--settle", type=float, default=0.0, help="Do not count the first seconds of a run."),
    _option("--drain", type=float, default=120.0, help="Seconds to wait for the last answers."),
    _option("--max-late", type=float, default=10.0, help="Milliseconds a send may be late."),
    _option("--warm-ups", type=click.IntRange(min=0), default=2, help="Requests before the first."),
    _option("--processes", type=int, default=1, show_default=True, help="Clients side by side."),
    _option("--workers", type=click.IntRange(min=1), help="To divide by. [default: the server's]"),
    _option("--tell-slo", is_flag=True, help="Tell nodeserve the limits with every request."),
    _option("--save", type=click.Path(path_type=Path), help="Write everything as JSON here."),
    _option("--details", is_flag=True, help="With every request in it."),
    _option("--figures", type=click.Path(path_type=Path), help="Draw figures into this folder."),
    _option("--json", "as_json", is_flag=True, help="Print the numbers as JSON."),
)


def bench_options(command: Command) -> Command:
    for option in reversed(OPTIONS):
        command = option(command)
    return source_options(command)


def target_options(options: dict[str, Any], source: Source, limits: Limits) -> TargetOptions:
    """ConfigError for what does not go together."""
    if options["url"] is not None and options["socket"] is not None:
        raise ConfigError("--url and --socket are two servers: use one of them")
    key = os.environ.get(KEY_VARIABLE)
    use_key = key and options["url"] is not None
    if options["tell_slo"] and (limits.relative or limits.e2el or not limits.of_request()):
        raise ConfigError("--tell-slo is for limits of ttft and tpot in milliseconds alone")
    if options["url"] is None:
        _refuse(options, OF_URLS, "is for --url: over the socket prompts are token ids")
    if options["api"] == "chat":
        _refuse(options, ("text",), "is for --api completions: chats are texts anyway")
    return TargetOptions(
        url=options["url"],
        socket=options["socket"],
        api=options["api"],
        model=options["model"],
        tokenizer=options["tokenizer"],
        prompts_as_text=options["text"],
        vocab_size=options["vocab_size"],
        ignore_eos=not options["stop_at_eos"],
        extra_body=parse_object(options["extra_body"]),
        headers={"Authorization": f"Bearer {key}"} if use_key else {},
        block_tokens=source.block_tokens,
        slo_ms=limits.of_request() if options["tell_slo"] else {},
    )


def limits_for(options: dict[str, Any]) -> Limits:
    """As given, else those of the named workload; none for traces."""
    if options["goodput"]:
        return parse_limits(options["goodput"])
    if options["trace"] is not None:
        return Limits()
    return limits_of(workload_named(options["workload"] or WORKLOAD).slo)


def run_options(options: dict[str, Any], limits: Limits) -> BenchOptions:
    for name, most in (("goal", 1.0 - 1e-9), ("confidence", MAX_CONFIDENCE)):
        if not 0.0 < options[name] <= most:
            raise ConfigError(f"--{name} {options[name]:.12g}: use a share between 0 and 1")
    if not options["find_goodput"]:
        _refuse(options, OF_SEARCHES, "is for --find-goodput")
        if options["requests"] is not None:
            _refuse(options, ("duration",), "and --requests both say how many: use one of them")
    for name in ("min_rate", "max_rate"):
        if options[name] is not None and not 0.0 < options[name] < math.inf:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} {options[name]:g}: use requests a second above 0")
    if options["tolerance"] is not None and not 0.0 < options["tolerance"] < math.inf:
        raise ConfigError(f"--tolerance {options['tolerance']:g}: use a share such as 0.05")
    if not options["as_json"] and options["save"] is None:
        _refuse(options, ("details",), "goes into JSON: use --json or --save as well")
    if options["duration"] is not None and not 0.0 < options["duration"] < math.inf:
        raise ConfigError(f"--duration {options['duration']:g}: use seconds above 0")
    if options["find_goodput"] and limits == Limits():
        raise ConfigError(
            "--find-goodput needs limits, or every rate is good: give --goodput such as ttft:200"
            " tpot:50"
        )
    for name in ("settle", "drain", "max_late"):
        if not 0.0 <= options[name] < math.inf:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} {options[name]:g}: use a time of 0 or more")
    return BenchOptions(
        limits=limits,
        goal=options["goal"],
        confidence=options["confidence"],
        settle_s=options["settle"],
        drain_s=options["drain"],
        max_late_s=options["max_late"] / 1e3,
        concurrency=options["concurrency"],
        num_warm_ups=options["warm_ups"],
        forced=not options["stop_at_eos"],
    )


def _refuse(options: dict[str, Any], names: Sequence[str], why: str) -> None:
    """ConfigError for the first of these that was given, and would do nothing."""
    for name in names:
        if options[name] is not None and options[name] is not False:
            raise ConfigError(f"--{name.replace('_', '-')} {why}")


def search_options(options: dict[str, Any], start: float, available: int | None) -> SearchOptions:
    most = options["max_requests"] or MAX_REQUESTS
    most = min(most, available or most)
    return SearchOptions(
        start=start,
        low=start / FLOOR if options["min_rate"] is None else options["min_rate"],
        high=options["max_rate"] or math.inf,
        goal=options["goal"],
        confidence=options["confidence"],
        tolerance=options["tolerance"] or TOLERANCE,
        min_requests=min(options["requests"] or 200, most),
        min_duration_s=options["duration"] or 0.0,
        max_requests=most,
    )


def rates_of(options: dict[str, Any]) -> list[float | None]:
    """The rates of the runs, or the first of a search; [None] for the trace's own, for a closed
    loop, and for a search that is told none."""
    ways = ("sweep", "find_goodput", "concurrency")
    chosen = [f"--{name.replace('_', '-')}" for name in ways if options[name]]
    if len(chosen) > 1:
        raise ConfigError(f"{' and '.join(chosen)} do not go together: use one")
    for name in ("sweep", "concurrency"):
        if options["rate"] is not None and options[name]:
            raise ConfigError(f"--rate and --{name} do not go together: use one")
    text = options["sweep"] or options["rate"]
    if text is None:
        if not (options["trace"] or options["concurrency"] or options["find_goodput"]):
            raise ConfigError("at which rate? use --rate, --sweep or --concurrency")
        return [None]
    try:
        rates = [float(word) for word in str(text).split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0.0 < rate < math.inf for rate in rates):
        raise ConfigError(f"rates {text}: use numbers above 0 of requests a second, such as 2,4,8")
    if len(rates) > 1 and not options["sweep"]:
        raise ConfigError("--rate takes one number; several are a --sweep")
    return list(rates)


def parse_object(text: str | None) -> dict[str, Any]:
    try:
        value = {} if text is None else json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f"--extra-body {text}: use a JSON object")
    return value
