"""`nodeserve bench`: load on a running server, and how well it was served."""

import asyncio
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nodeserve.cli.bench_options import (
    BenchCommand,
    bench_options,
    limits_for,
    rates_of,
    run_options,
    search_options,
    target_options,
)
from nodeserve.cli.show import show_table
from nodeserve.cli.sources import dropped_words, source_of, source_words
from nodeserve.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from nodeserve.loadgen.bench import Bench, Result
    from nodeserve.loadgen.measure import Report, Times
    from nodeserve.loadgen.targets import About
    from nodeserve.plan.requests import Requests
    from nodeserve.plan.search import Found

FEW = 200  # requests of a run, unless told
FIRST_RATE = 1.0  # of a search
INVALID = 3  # exit code of a run that does not count
REASONS = {
    "found": "between a rate that passed and one that did not",
    "low": "no rate passed",
    "high": "the highest rate allowed passed",
    "invalid": "the clients could not send that fast: use --processes, and leave them cores",
    "probes": "too many probes; the range is wider than --tolerance",
}


@click.command(cls=BenchCommand)
@bench_options
def bench(**options: Any) -> None:
    """Send load to a running server and measure how well it is served.

    Requests are sent on schedule whether or not answers are back. A request is good when it meets
    all its limits; whatever fails is not. Exit code 3: clients were late, so the run says nothing.
    """
    sys.exit(asyncio.run(Session(options).run()))


class Session:
    """One call of the command."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.source = source_of(options)
        self.limits = limits_for(options)
        self.settings = run_options(options, self.limits)
        self.target = target_options(options, self.source, self.limits)
        self.rates = rates_of(options)
        prepare_places(options["save"], options["figures"])
        self.results: list[Result] = []

    async def run(self) -> int:
        """The exit code."""
        from nodeserve.cli.bench_progress import Progress
        from nodeserve.loadgen.bench import Bench
        from nodeserve.loadgen.fleet import Fleet
        from nodeserve.plan.requests import Requests

        found = None
        with Progress() as progress:
            async with Fleet(self.target, self.options["processes"]) as fleet:
                about = fleet.about
                most = self.options["max_model_len"] or about.max_model_len
                requests = Requests(self.source, most)
                bench = Bench(fleet, requests, self.settings, progress.on_news)
                progress.say("warming up")
                await bench.prepare()
                if self.options["find_goodput"]:
                    found = await self._search(bench, requests, progress.result)
                else:
                    for rate in self.rates:
                        result = await bench.run(rate, self._num_requests(rate))
                        progress.result(result)
                        self.results.append(result)
        self._report(about, bench, requests, found)
        if found is not None:
            return INVALID if found.reason == "invalid" else 0
        return 0 if all(one.report.punctuality.valid for one in self.results) else INVALID

    async def _search(self, bench: "Bench", requests: "Requests", show: Any) -> "Found":
        start = self.rates[0] or requests.own_rate or FIRST_RATE

        def on_result(result: "Result") -> None:
            self.results.append(result)
            show(result)

        search = search_options(self.options, start, requests.num_available)
        return await bench.search(search, on_result)

    def _num_requests(self, rate: float | None) -> int:
        num: int | None = self.options["requests"]
        duration_s: float | None = self.options["duration"]
        if num is not None:
            return num
        if duration_s is None:
            return FEW if self.source.trace is None or rate else 1 << 30
        if rate is None:
            raise ConfigError(
                "--duration needs a --rate: --window cuts a trace, --requests a closed loop"
            )
        return math.ceil(rate * duration_s)

    def _report(
        self, about: "About", bench: "Bench", requests: "Requests", found: "Found | None"
    ) -> None:
        everything = self._json(about, bench, requests, found)
        if self.options["save"] is not None:
            path: Path = self.options["save"]
            path.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
        if self.options["as_json"]:
            click.echo(json.dumps(everything))
        else:
            self._show(about, requests, found)
        if self.options["figures"] is not None:
            from nodeserve.loadgen.figures import draw
            from nodeserve.loadgen.measure import counts

            settings, folder = self.settings, self.options["figures"]
            settle_s = settings.settle_s
            judged = [
                one._replace(samples=[sample for sample in one.samples if counts(sample, settle_s)])
                for one in self.results
            ]
            goal, confidence = settings.goal, settings.confidence
            kinds, forced = ("svg", "png"), settings.forced
            draw(judged, bench.slo_of, goal, confidence, folder, kinds, forced)

    def _show(self, about: "About", requests: "Requests", found: "Found | None") -> None:
        click.echo(heading(about, self, requests))
        for note in notes(about, self.results, requests):
            click.echo(f"note: {note}")
        if len(self.results) == 1 and found is None:
            show_result(self.results[0].report, self.settings.confidence)
            if self.settings.concurrency is None:
                click.echo(f"{'arrivals':<24}{arrivals_words(self.results[0], requests)}")
        else:
            show_table(comparison(self.results, self.settings.confidence))
        if found is not None:
            click.echo(verdict(found, self._workers(about)))

    def _workers(self, about: "About") -> int | None:
        chosen: int | None = self.options["workers"]
        return chosen or about.num_workers

    def _json(
        self, about: "About", bench: "Bench", requests: "Requests", found: "Found | None"
    ) -> dict[str, Any]:
        from dataclasses import asdict

        from nodeserve.loadgen.report import details_json, found_json, result_json
        from nodeserve.plan.requests import described

        workers = self._workers(about)
        runs = []
        for result in self.results:
            run = result_json(result, self.settings.confidence, workers)
            run["requests"] = described(self.source, requests, result.arrivals, result.rate)
            if self.options["details"]:
                settings = self.settings
                run.update(details_json(result, bench.slo_of, settings.settle_s, settings.forced))
            runs.append(run)
        return {
            "backend": about.kind,
            "model_id": about.model,
            "num_workers": workers,
            "max_concurrency": self.settings.concurrency,
            "goodput_config": self.limits.words(),
            "goal": self.settings.goal,
            "confidence": self.settings.confidence,
            "unloaded": bench.unloaded and asdict(bench.unloaded),
            "exact_prompts": about.exact_prompts,
            "search": found and found_json(found, workers),
            "runs": runs,
        }


def prepare_places(file: Path | None, folder: Path | None) -> None:
    """Folders for what will be written; ConfigError where that cannot be, before anything takes
    long."""
    if folder is not None:
        from nodeserve.loadgen.figures import check_matplotlib

        check_matplotlib("--figures")
    try:
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            is_new = not file.exists()
            file.open("a", encoding="utf-8").close()
            if is_new:
                file.unlink()  # nothing is left of a run that fails
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename}: {error.strerror}") from None


def heading(about: "About", session: Session, requests: "Requests") -> str:
    what = source_words(session.source)
    limits = session.limits.words() or "no limits"
    return f"{about.model} ({about.kind})  {what}  {limits}  goal {session.settings.goal:.0%}"


def notes(about: "About", results: "list[Result]", requests: "Requests") -> list[str]:
    """What a reader must know to believe the numbers."""
    found = []
    if not about.exact_prompts:
        found.append("prompts have about the lengths asked for: --tokenizer makes them exact")
    if requests.dropped_share:
        found.append(dropped_words(requests.dropped_share))
    if num := sum(one.report.num_short for one in results):
        found.append(
            f"{num} outputs are shorter than asked for: misses, unless --stop-at-eos lets them end"
        )
    if about.exact_prompts and (num := sum(one.report.num_other_prompts for one in results)):
        found.append(f"the server counts other lengths than were sent for {num} prompts")
    for result in results:
        for reason in result.report.punctuality.reasons:
            found.append(f"INVALID{_at(result.rate)}: {reason}")
    return found


def _at(rate: float | None) -> str:
    return "" if rate is None else f" at {rate:.3g}/s"


def show_result(report: "Report", confidence: float) -> None:
    """Times in rows, then the rest."""
    from nodeserve.cli.simulate import plain_table

    table = plain_table("milliseconds", "mean", "p50", "p90", "p99")
    rows: list[tuple[str, Times | None]] = [
        ("TTFT", report.ttft),
        ("TPOT", report.tpot),
        ("between tokens", report.itl),
        ("worst tenth of gaps", report.worst_gap),
        ("end to end", report.e2e),
    ]
    for name, times in rows:
        if times is not None:
            cells = (times.mean, times.p50, times.p90, times.p99)
            table.add_row(name, *(f"{1e3 * seconds:.1f}" for seconds in cells))
    show_table(table)
    for name, cell in numbers_of(report, confidence).items():
        click.echo(f"{name:<24}{cell}")


def numbers_of(report: "Report", confidence: float) -> dict[str, str]:
    """All but the times."""
    low, high = report.tally.interval(confidence)
    late = report.punctuality
    tally = report.tally
    seconds = report.duration_s or math.inf
    cells = {
        "requests": f"{tally.num_offered} offered, {report.num_done} served well"
        + (f", {tally.num_unknown} left unknown" if tally.num_unknown else ""),
        "good": f"{tally.num_good}, {tally.share:.1%} ({low:.1%} to {high:.1%})",
        "good requests a second": f"{report.goodput_per_s:.3g} of {report.requests_per_s:.3g}",
        "output tokens a second": f"{report.output_tokens / seconds:.1f},"
        f" {report.good_tokens / seconds:.1f} of them good",
        "sent late": f"{1e3 * late.late_p50_s:.2f} ms (p50),"
        f" {1e3 * late.late_max_s:.1f} ms at most",
    }
    if report.smallest_scale is not None and report.smallest_scale > 0.0:
        cells["smallest SLO scale"] = f"{report.smallest_scale:.2f}"
    for name, counts in (("missed", report.missed), ("because of", report.blame)):
        if counts:
            cells[name] = ", ".join(f"{what} {num}" for what, num in counts.items())
    return cells


def arrivals_words(result: "Result", requests: "Requests") -> str:
    """How requests came: what a rate alone does not say."""
    from nodeserve.plan.scaling import traffic

    numbers = traffic(result.arrivals)
    known = {
        "requests/s": numbers.rate,
        "CV": numbers.cv,
        "IoD (1 s)": numbers.iod_1s,
        "IoD (10 s)": numbers.iod_10s,
        "times divided by": requests.times_divided_by(result.rate),
    }
    return ", ".join(f"{name} {value:.3g}" for name, value in known.items() if value is not None)


def comparison(results: "list[Result]", confidence: float) -> "Table":
    """A row for each run."""
    from nodeserve.cli.simulate import plain_table

    table = plain_table(
        "requests/s", "sent", "good", "interval", "TTFT p50", "p99", "TPOT p50", "p99", "because of"
    )
    for result in sorted(results, key=lambda one: one.rate or 0.0):
        report = result.report
        low, high = report.tally.interval(confidence)
        table.add_row(
            "-" if result.rate is None else f"{result.rate:.3g}",
            str(report.tally.num_offered),
            f"{report.tally.share:.1%}" + (" cut" if result.given_up else ""),
            f"{low:.1%} to {high:.1%}",
            *_ms(report.ttft),
            *_ms(report.tpot),
            next(iter(report.blame), ""),
        )
    return table


def _ms(times: "Times | None") -> tuple[str, str]:
    if times is None:
        return "-", "-"
    return f"{1e3 * times.p50:.1f}", f"{1e3 * times.p99:.1f}"


def verdict(found: "Found", workers: int | None) -> str:
    """The goodput in a line."""
    if found.reason == "invalid" and not found.rate:
        return f"goodput unknown ({REASONS[found.reason]})"
    words = f"goodput {found.rate:.3g} requests/s"
    if workers:
        words += f", {found.rate / workers:.3g} a worker"
    if math.isfinite(found.too_high):
        words += f"; {found.too_high:.3g} is too much"
    sure = "" if found.decided else "; not with the stated confidence at both ends"
    return f"{words} ({REASONS[found.reason]}{sure})"
