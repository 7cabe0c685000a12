"""`nodeserve plan`: limits, requests and GPUs in, a layout out."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nodeserve.checkpoint import resolve as resolve_checkpoint
from nodeserve.cli.bench import prepare_places
from nodeserve.cli.plan_figure import check_drawing, draw
from nodeserve.cli.show import show_table
from nodeserve.cli.simulate import plain_table
from nodeserve.cli.sources import dropped_words, source_of, source_options, source_words
from nodeserve.cli.startable import fits, holds, knows_teams, startable, whole_worker
from nodeserve.config import EngineConfig, ModelConfig, parse_slo
from nodeserve.coordinator.placement import choose_context
from nodeserve.errors import ConfigError, ModelError
from nodeserve.plan.affinity import Placement, place
from nodeserve.plan.candidates import by_formula
from nodeserve.plan.efforts import EFFORTS
from nodeserve.plan.estimates import Estimate
from nodeserve.plan.evaluate import Question, requests_of
from nodeserve.plan.goodput import Slo
from nodeserve.plan.named import workload_named
from nodeserve.plan.planner import Report, Tell
from nodeserve.plan.planner import plan as search_plan
from nodeserve.plan.pool import searching
from nodeserve.plan.requests import Source, described
from nodeserve.plan.verdict import Named, Verdict, start_command, verdict
from nodeserve.policy.profile import Profile
from nodeserve.profile_store import profile_or_family

if TYPE_CHECKING:
    from rich.table import Table

ALGORITHMS = ("search", "high", "low")
LOOK = 1000  # requests whose statistics are told
UNTRIED = "instances of several GPUs have not run on real ones yet (docs/gpu.md)"
MIN_TRACE = 100  # requests: with fewer, a share of them says little


@click.command()
@click.argument("model", required=False)
@click.option("--profile", required=True, help="What passes cost: a name, see `simulate --help`.")
@click.option("--gpus", "num_gpus", type=int, required=True, help="How many there are.")
@click.option("--slo", help="Such as ttft=500ms,tpot=50ms. [default: the workload's own]")
@source_options
@click.option(
    "--algorithm",
    type=click.Choice(ALGORITHMS),
    default="search",
    show_default=True,
    help="search: every layout of these GPUs, mixed ones too. high, low: DistServe's two, for high"
    " and low node affinity.",
)
@click.option("--rate", type=float, help="Requests a second that high and low have to serve.")
@click.option("--ep", "eps", default="1", show_default=True, help="Expert parallel degrees: 4,8.")
@click.option("--startable", is_flag=True, help="Only shapes that `start` can start of MODEL.")
@click.option("--measured", is_flag=True, help="Only shapes that the profile has measured.")
@click.option("--goal", type=float, default=0.9, show_default=True, help="Share to be in time.")
@click.option("--effort", type=click.Choice(tuple(EFFORTS)), default="normal", show_default=True)
@click.option("--max-num-seqs", type=int, help="In one decode step. [default: the profile's]")
@click.option("--noise", type=float, help="Deviation of passes. [default: the profile's]")
@click.option("--processes", type=click.IntRange(min=1), help="[default: one for each core]")
@click.option("--figure", type=click.Path(path_type=Path), help="Draw it: a .png or .svg file.")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
def plan(
    model: str | None, figure: Path | None, as_json: bool, processes: int | None, **options: Any
) -> None:
    """Find the layout with the most goodput for a workload and its limits.

    Layouts are simulated with the policy of the real engine; nothing is started. MODEL only goes
    into the command that is printed; where it lies here, requests are those that its context holds.
    """
    config = readable_config(model)
    named = Named(model, options["profile"], config.max_position if config else None)
    # The default model stands for any: it only makes the command shorter.
    question = within(question_of(options), named.own_context if model else None)
    if options["startable"]:
        question = only_startable(question, config)
    check_together(options, figure)
    check_requests(question)
    prepare_places(figure, None)
    effort, began_s = EFFORTS[options["effort"]], time.monotonic()
    with searching(processes) as run, progress(as_json) as tell:
        if options["algorithm"] != "search":
            placement = place(question, options["algorithm"], options["rate"], effort, run, tell)
            seconds = time.monotonic() - began_s
            show_placement(placement, question, named, as_json, seconds)
            return
        report = search_plan(question, effort, run, tell)
        said = verdict(report)
    seconds = time.monotonic() - began_s
    if figure is not None:
        draw(report, figure, heading(question, options["profile"]))
    if as_json:
        click.echo(json.dumps(as_numbers(report, said, named, seconds)))
        return
    show_report(report, said, named, seconds)


# ---- what was asked for


def question_of(options: dict[str, Any]) -> Question:
    """ConfigError says which option cannot be."""
    noise, goal = options["noise"], options["goal"]
    if not 0.0 < goal < 1.0:
        raise ConfigError(f"--goal {goal:g}: use a share between 0 and 1, such as 0.9")
    if noise is not None and not 0.0 <= noise <= 1.0:
        raise ConfigError(f"--noise {noise:g}: use 0 to 1, such as 0.03")
    rate = options["rate"]
    if rate is not None and not 0.0 < rate <= 1e6:
        raise ConfigError(f"--rate {rate:g}: use a number above 0 of requests a second")
    num_seqs = options["max_num_seqs"]
    if num_seqs is not None and num_seqs < 1:
        raise ConfigError(f"--max-num-seqs {num_seqs}: use 1 or more")
    source = source_of(options)
    model = profile_or_family(options["profile"])
    if options["measured"] and isinstance(model, Profile):
        model = replace(model, anatomy=None)  # that formulas would need
    return Question(
        model=model,
        traffic=source,
        slo=slo_of(options["slo"], source),
        num_gpus=options["num_gpus"],
        eps=eps_of(options["eps"]),
        goal=goal,
        seed=options["seed"],
        noise=noise,
        max_num_seqs=num_seqs,
        max_model_len=options["max_model_len"],
    )


def only_startable(question: Question, model: ModelConfig | None) -> Question:
    """With shapes that the command to print can start; said on stderr which ones it cannot. Whether
    a model that does not lie here fits them nobody knows."""
    profile = question.model.within(question.context, None)
    checks = [whole_worker, holds(question.context, EngineConfig().block_size)]
    checks += [knows_teams(profile), *([fits(model)] if model else [])]
    found = startable(profile, question.num_gpus, question.eps, checks)
    for note in found.notes():
        click.echo(note, err=True)
    return replace(question, model=profile, shapes=found.shapes)


def readable_config(model: str | None) -> ModelConfig | None:
    """What a model is made of, if it lies here: nothing is fetched for a plan."""
    if model is not None and not Path(model).expanduser().exists():
        return None
    try:
        return resolve_checkpoint(model, "dummy").config
    except ModelError:
        return None


def within(question: Question, own: int | None) -> Question:
    """For requests that a model of this context takes; ConfigError where it was asked for more."""
    if own is None or own >= question.context:
        return question
    choose_context(question.max_model_len, own)
    return replace(question, max_model_len=own)


def check_requests(question: Question) -> None:
    """Says on stderr how many requests fit no context, since no layout can serve these; ConfigError
    where a trace is too short to tell anything."""
    if not isinstance(question.traffic, Source):
        return
    requests = requests_of(question.traffic, question.context)
    if requests.dropped_share:
        words = dropped_words(requests.dropped_share)
        click.echo(f"note: context {question.context}: {words}", err=True)
    if requests.num_available is not None and requests.num_available < MIN_TRACE:
        raise ConfigError(
            f"trace {question.traffic.trace} has {requests.num_available} requests: a plan needs"
            f" {MIN_TRACE} or more"
        )


def check_together(options: dict[str, Any], figure: Path | None) -> None:
    """ConfigError for options that would do nothing, before anything takes long."""
    searches = options["algorithm"] == "search"
    if searches and options["rate"] is not None:
        raise ConfigError("--rate is for --algorithm high and low: search uses all GPUs given")
    if figure is not None:
        if not searches:
            raise ConfigError("--figure draws the finalists of --algorithm search: leave it out")
        check_drawing(figure)


def slo_of(text: str | None, source: Source) -> Slo:
    """The one given, else the workload's."""
    if text is None:
        return Slo() if source.trace else workload_named(source.workload).slo
    limits = parse_slo(text)
    return Slo(*(limits[name] / 1e3 if name in limits else None for name in ("ttft_ms", "tpot_ms")))


def eps_of(text: str) -> tuple[int, ...]:
    try:
        degrees = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        degrees = (0,)
    if not all(1 <= degree <= 1024 for degree in degrees):
        raise ConfigError(f"--ep {text}: use degrees from 1 to 1024, such as 1 or 4,8")
    return degrees


@contextmanager
def progress(quiet: bool) -> Iterator[Tell]:
    """A line that says how far it is, where a person looks."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console

    with Console(stderr=True).status("planning") as status:
        yield lambda text: status.update(f"planning: {text}")


# ---- what came of it


def show_report(report: Report, said: Verdict, named: Named, seconds: float) -> None:
    question = report.question
    click.echo(heading(question, named.profile))
    show_table(ranking(report))
    click.echo(f"{said.reason}.")
    click.echo(
        f"{report.num_candidates} layouts: {report.num_impossible} can serve nobody in time,"
        f" {report.num_bounded} cannot win on paper or by what others showed, {report.num_behind}"
        " were behind;"
        f" {report.num_requests} requests simulated in {seconds:.0f} s"
    )
    show_unmeasured(question, [one.candidate.layout for one in report.ranked])
    if report.best is not None:
        show_command(report.best, question, named)


def show_unmeasured(question: Question, layouts: Sequence[str]) -> None:
    """The shapes of which nobody measured a pass."""
    if names := ", ".join(unmeasured_names(question, layouts)):
        click.echo(f"by formula from one worker's passes, not measured (docs/plan.md): {names}")


def unmeasured_names(question: Question, layouts: Sequence[str]) -> list[str]:
    return [str(shape) for shape in by_formula(question.model, layouts)]


def heading(question: Question, profile: str) -> str:
    slo = question.slo
    limits = ", ".join(
        f"{name} {1e3 * limit_s:g} ms"
        for name, limit_s in (("TTFT", slo.ttft_s), ("TPOT", slo.tpot_s))
        if limit_s is not None
    )
    traffic = question.traffic
    what = source_words(traffic) if isinstance(traffic, Source) else f"{len(traffic)} requests"
    return (
        f"{profile} on {question.num_gpus} GPUs, {what}; {question.goal:.0%} of the requests with"
        f" {limits}"
    )


def ranking(report: Report) -> "Table":
    table = plain_table(
        "layout", "GPUs", "chunk", "window", "goodput/s", "a GPU", "95 % range", "at most"
    )
    for one in report.ranked:
        table.add_row(*cells(one, report.question))
    return table


def cells(one: Estimate, question: Question) -> list[str]:
    high = "" if one.high is None else f"{one.high:.3g}"
    return [
        one.candidate.layout,
        str(one.num_gpus),
        str(one.candidate.max_num_batched_tokens),
        "auto" if one.candidate.window_s is None else "off",
        f"{one.goodput:.3g}",
        f"{one.goodput / question.num_gpus:.3g}",
        f"{one.low:.3g} to {high}",
        f"{one.most:.3g}",
    ]


def show_command(one: Estimate, question: Question, named: Named) -> None:
    command = start_command(one.candidate, question, named)
    if "--device sim" in command:
        click.echo("the profile does not say what a rank is made of; simulated, it starts by")
    elif ":" in one.candidate.layout:
        click.echo(f"{UNTRIED}:")
    click.echo(command)


def as_numbers(report: Report, said: Verdict, named: Named, seconds: float) -> dict[str, Any]:
    """Everything, for a program."""
    question, best = report.question, report.best
    source = question.traffic
    assert isinstance(source, Source)
    requests = requests_of(source, question.context)
    return {
        "profile": named.profile,
        "workload": "trace" if source.trace else source.workload,
        "requests": described(source, requests, requests.first(LOOK, 1.0), 1.0),
        "slo": asdict(question.slo),
        "num_gpus": question.num_gpus,
        "goal": question.goal,
        "confidence": question.confidence,
        "seed": question.seed,
        "best": best and best.candidate.layout,
        "command": best and start_command(best.candidate, question, named),
        "verdict": asdict(said),
        "ranked": [as_row(one, question.num_gpus) for one in report.ranked],
        "by_formula": unmeasured_names(question, [one.candidate.layout for one in report.ranked]),
        "num_candidates": report.num_candidates,
        "num_impossible": report.num_impossible,
        "num_bounded": report.num_bounded,
        "num_behind": report.num_behind,
        "num_requests": report.num_requests,
        "seconds": seconds,
    }


def as_row(one: Estimate, num_gpus: int) -> dict[str, Any]:
    """`num_gpus` is what a GPU's share is of."""
    return {
        **asdict(one.candidate),
        "kind": one.candidate.kind,
        "num_gpus": one.num_gpus,
        "goodput": one.goodput,
        "goodput_per_gpu": one.goodput / num_gpus,
        "low": one.low,
        "high": one.high,
        "bound": one.most,
        "probes": [
            {"rate": probe.rate, "requests": probe.tally.num_offered, "attained": probe.tally.share}
            for probe in one.probes
        ],
    }


def show_placement(
    placement: Placement,
    question: Question,
    named: Named,
    as_json: bool,
    seconds: float,
) -> None:
    """One of DistServe's algorithms: what it looked at, what it says, what a simulation says."""
    whole = placement.estimate
    if as_json:
        numbers = {
            "algorithm": placement.algorithm,
            "layout": placement.layout,
            "num_gpus": placement.num_gpus,
            "whole": as_row(whole, placement.num_gpus),
            "phases": [
                {**asdict(one), "role": one.role.value, "shape": str(one.shape)}
                for one in placement.phases
            ],
            "units": [as_row(one, one.num_gpus) for one in placement.units],
            "seconds": seconds,
        }
        click.echo(json.dumps(numbers))
        return
    click.echo(heading(question, named.profile))
    table = plain_table("one of", "GPUs", "goodput/s", "a GPU")
    for phase in placement.phases:
        name = f"{phase.role.value} {phase.shape}".strip()
        table.add_row(name, str(phase.num_gpus), f"{phase.goodput:.3g}", f"{phase.per_gpu:.3g}")
    for unit in placement.units:
        layout, per_gpu = unit.candidate.layout, unit.goodput / unit.num_gpus
        table.add_row(layout, str(unit.num_gpus), f"{unit.goodput:.3g}", f"{per_gpu:.3g}")
    show_table(table)
    click.echo(
        f"{placement.layout} on {placement.num_gpus} GPUs: {whole.goodput:.3g} requests/s in time,"
        f" {whole.goodput / placement.num_gpus:.3g} a GPU, simulated as a whole; {seconds:.0f} s"
    )
    show_unmeasured(question, [placement.layout])
    show_command(whole, question, named)
