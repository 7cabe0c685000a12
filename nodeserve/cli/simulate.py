"""`nodeserve simulate`: a node in virtual time, with the policy of the real one."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nodeserve.cli.settings import ENGINE_OPTIONS, given
from nodeserve.cli.show import show_table
from nodeserve.config import EngineConfig
from nodeserve.errors import ConfigError
from nodeserve.plan.candidates import by_formula
from nodeserve.plan.records import Arrival, Engine, Faults, Scenario
from nodeserve.plan.simulator import simulate as run
from nodeserve.plan.summary import Spread, Summary, summarize
from nodeserve.plan.workloads import (
    Workload,
    at_rate,
    generate,
    parse_gaps,
    parse_lengths,
    read_trace,
)
from nodeserve.policy.units import ADMISSIONS
from nodeserve.profile_store import profile_or_family

if TYPE_CHECKING:
    from rich.table import Table

Command = TypeVar("Command", bound=Callable[..., Any])

DEFAULTS = EngineConfig(layout="4p:ep8,1d:ep8", profile="moe-ep8", device="sim")
SETTINGS = (
    *("profile", "layout", "admission", "window", "window_k", "decode_allocation"),
    *("slo", "on_overload", "max_num_queued_reqs", "max_num_queued_tokens"),
    *("max_num_seqs", "max_num_batched_tokens", "block_size", "seed"),
)
MAX_REQUESTS = 10_000_000


def node_settings(command: Command) -> Command:
    """Those settings of a server that a simulated one has as well."""
    options = {option.name: option for option in ENGINE_OPTIONS}
    for name in reversed(SETTINGS):
        command = options[name].decorate(command)
    return command


@click.command()
@node_settings
@click.option(
    "--prefill-allocation",
    type=click.Choice(("water-filling", "round-robin")),
    default="water-filling",
    show_default=True,
    help="How a departure is spread over the ranks of an instance.",
)
@click.option("--rate", type=float, help="Requests a second. [default: 60, or the trace's own]")
@click.option("--requests", type=int, help="How many. [default: 5000, or all of the trace]")
@click.option(
    "--arrivals", default="poisson", show_default=True, help="poisson, or gamma:CV for bursts."
)
@click.option(
    "--prompt",
    default="lognormal:1500",
    show_default=True,
    help="Tokens: a number, lognormal:MEAN[:SIGMA] or pareto:MEAN[:ALPHA[:MOST]].",
)
@click.option("--output", default="200", show_default=True, help="Tokens to write, likewise.")
@click.option(
    "--trace",
    type=click.Path(path_type=Path),
    help="CSV file with arrival_s,input_tokens,output_tokens, instead of all these.",
)
@click.option("--noise", type=float, help="Deviation of passes. [default: the profile's]")
@click.option(
    "--transit",
    "transit_ms",
    type=float,
    help="Milliseconds of a message from the coordinator to a worker, or back. [default: the"
    " profile's]",
)
@click.option("--lose-reports", type=float, default=0.0, help="Share of prefill passes not told.")
@click.option("--kill", help="INSTANCE@SECONDS: from then on it is silent.")
@click.option(
    "--delay-passes",
    type=click.IntRange(min=0),
    default=0,
    help="Let the engine hold a prefill pass until all ranks have work, for so many ticks of 5 ms.",
)
@click.option("--compare", is_flag=True, help="All admissions side by side, on the same requests.")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
def simulate(compare: bool, as_json: bool, **options: Any) -> None:
    """Run requests through a simulated node and show where their time goes.

    Passes take what --profile says, and everything that decides is what a real node runs. Times
    are virtual: an hour of traffic takes seconds.
    """
    scenario, slo = scenario_of(options)
    arrivals = arrivals_of(options, scenario, slo)
    admissions = ADMISSIONS if compare else (scenario.dispatch.admission,)
    scenarios = [
        replace(scenario, dispatch=replace(scenario.dispatch, admission=admission))
        for admission in admissions
    ]
    summaries = {one.dispatch.admission: summarize(run(one, arrivals), one) for one in scenarios}
    if as_json:
        click.echo(json.dumps(report(scenario, arrivals, summaries)))
        return
    click.echo(heading(scenario, arrivals))
    assert not isinstance(scenario.profile, str), "read already"
    if shapes := ", ".join(map(str, by_formula(scenario.profile, [scenario.layout]))):
        click.echo(f"passes by formula, not measured (docs/instances.md): {shapes}")
    if compare:
        show_table(comparison(summaries))
    else:
        show_one(summaries[scenario.dispatch.admission])


# ---- what was asked for


def scenario_of(options: dict[str, Any]) -> tuple[Scenario, dict[str, float]]:
    """The node, and the SLOs of its requests; ConfigError says which option cannot be."""
    from nodeserve.coordinator.placement import check_names, check_numbers
    from nodeserve.coordinator.policies import policies_of

    config = replace(DEFAULTS, **given({name: options[name] for name in SETTINGS}))
    check_numbers(config)
    check_names(config)
    model = profile_or_family(str(config.profile))
    profile = Scenario(str(config.layout), model).resolved_profile
    policies = policies_of(
        config,
        config.max_num_seqs or profile.max_num_seqs,
        config.max_num_batched_tokens or profile.max_num_batched_tokens,
    )
    allocation = options["prefill_allocation"]
    noise, loss, transit_ms = options["noise"], options["lose_reports"], options["transit_ms"]
    if noise is not None and not 0.0 <= noise <= 1.0:
        raise ConfigError(f"--noise {noise:g}: use 0 to 1, such as 0.03")
    if not 0.0 <= loss <= 1.0:
        raise ConfigError(f"--lose-reports {loss:g}: use a share from 0 to 1, such as 0.1")
    scenario = Scenario(
        layout=str(config.layout),
        profile=model,
        dispatch=replace(policies.dispatch, prefill_allocation=allocation),
        decode_allocation=policies.decode_allocation,
        flow=policies.flow,
        block_size=config.block_size,
        seed=config.seed,
        noise=noise,
        transit_s=None if transit_ms is None else transit_ms / 1e3,
        faults=faults_of(options["kill"], loss),
        engine=Engine(options["delay_passes"]),
    )
    return scenario, dict(policies.slo)


def faults_of(kill: str | None, loss: float) -> Faults:
    if kill is None:
        return Faults(loss)
    instance, _, when_s = kill.partition("@")
    try:
        return Faults(loss, int(instance), float(when_s))
    except ValueError:
        raise ConfigError(f"--kill {kill}: use INSTANCE@SECONDS, such as 1@30") from None


def arrivals_of(
    options: dict[str, Any], scenario: Scenario, slo: dict[str, float]
) -> list[Arrival]:
    """The requests; ConfigError says which option cannot be."""
    rate, num, trace = options["rate"], options["requests"], options["trace"]
    if rate is not None and not 0.0 < rate <= 1e6:
        raise ConfigError(f"--rate {rate:g}: use a number above 0 of requests a second")
    if num is not None and not 1 <= num <= MAX_REQUESTS:
        raise ConfigError(f"--requests {num}: use 1 to {MAX_REQUESTS}")
    ttft_s, tpot_s = (slo[name] / 1e3 if name in slo else None for name in ("ttft_ms", "tpot_ms"))
    if trace is not None:
        arrivals = [
            one._replace(ttft_slo_s=ttft_s, tpot_slo_s=tpot_s) for one in read_trace(trace, num)
        ]
        return arrivals if rate is None else at_rate(arrivals, rate)
    workload = Workload(
        rate=60.0 if rate is None else rate,
        num_requests=num or 5000,
        prompt=parse_lengths(options["prompt"]),
        output=parse_lengths(options["output"]),
        gaps=parse_gaps(options["arrivals"]),
        seed=scenario.seed,
        ttft_slo_s=ttft_s,
        tpot_slo_s=tpot_s,
    )
    return generate(workload, scenario.resolved_profile.max_model_len)


# ---- what came of it


def report(
    scenario: Scenario, arrivals: Sequence[Arrival], summaries: dict[str, Summary | None]
) -> dict[str, Any]:
    """Everything, for a program."""
    return {
        "scenario": asdict(scenario),
        "num_requests": len(arrivals),
        "summaries": {name: one and asdict(one) for name, one in summaries.items()},
    }


def heading(scenario: Scenario, arrivals: Sequence[Arrival]) -> str:
    span_s = arrivals[-1].arrived_s - arrivals[0].arrived_s
    rate = f"{(len(arrivals) - 1) / span_s:.1f} requests/s" if span_s > 0 else "all at once"
    prompts = sum(one.num_prompt_tokens for one in arrivals) / len(arrivals)
    outputs = sum(one.num_output_tokens for one in arrivals) / len(arrivals)
    return (
        f"{scenario.layout}  {scenario.resolved_profile.name}  {len(arrivals)} requests, {rate},"
        f" {prompts:.0f} prompt and {outputs:.0f} output tokens on average"
    )


def show_one(summary: Summary | None) -> None:
    """Stages in rows, mean and percentiles in columns."""
    if summary is None:
        click.echo("no request was served")
        return
    rows: list[tuple[str, Spread | None]] = [
        ("TTFT", summary.ttft_s),
        *((words_of(name), spread) for name, spread in summary.stages.items()),
        ("handoff", summary.handoff_s),
        ("time per output token", summary.tpot_s),
    ]
    table = plain_table("milliseconds", "mean", "p50", "p90", "p99")
    for name, spread in rows:
        if spread is not None:
            times = (spread.mean, spread.p50, spread.p90, spread.p99)
            table.add_row(name, *(f"{1e3 * seconds:.1f}" for seconds in times))
    show_table(table)
    for name, cell in numbers_of(summary).items():
        click.echo(f"{name:<22}{cell}")


def comparison(summaries: dict[str, Summary | None]) -> "Table":
    """A column for each admission."""
    table = plain_table("", *summaries)
    cells = {name: cells_of(one) for name, one in summaries.items()}
    rows = dict.fromkeys(row for column in cells.values() for row in column)
    for row in rows:
        table.add_row(row, *(column.get(row, "-") for column in cells.values()))
    return table


def cells_of(summary: Summary | None) -> dict[str, str]:
    if summary is None:
        return {}
    cells = {
        "TTFT mean, ms": f"{1e3 * summary.ttft_s.mean:.1f}",
        "TTFT p50, ms": f"{1e3 * summary.ttft_s.p50:.1f}",
        "TTFT p99, ms": f"{1e3 * summary.ttft_s.p99:.1f}",
    }
    for name, spread in summary.stages.items():
        cells[f"{words_of(name)}, ms"] = f"{1e3 * spread.mean:.1f}"
    if summary.tpot_s is not None:
        cells["TPOT mean, ms"] = f"{1e3 * summary.tpot_s.mean:.2f}"
        cells["TPOT p99, ms"] = f"{1e3 * summary.tpot_s.p99:.2f}"
    return {**cells, **numbers_of(summary)}


def numbers_of(summary: Summary) -> dict[str, str]:
    """All but the times of requests."""
    cells = {"requests": "  ".join(f"{num} {name}" for name, num in summary.outcomes.items())}
    cells["served a second"] = f"{summary.requests_per_s:.1f}"
    if summary.attained is not None:
        cells["met their SLO"] = f"{summary.attained:.1%}"
        cells["goodput a second"] = f"{summary.goodput_per_s:.1f}"
    if summary.num_preemptions:
        cells["put back"] = str(summary.num_preemptions)
    if passes := summary.prefill:
        cells["prefill passes"] = f"{passes.num_passes} of {1e3 * passes.mean_s:.0f} ms"
        cells["chunk utilisation"] = f"{passes.chunk_utilisation:.1%}"
        cells["balance of ranks"] = f"{passes.balance:.1%}"
        cells["active ranks"] = f"{passes.active_ranks:.1f}"
        cells["busy share"] = f"{passes.busy_share:.1%}"
        if passes.phase_spread is not None:
            cells["phase spread"] = f"{passes.phase_spread:.2f}"
    return cells


def words_of(field: str) -> str:
    """A field's name for people: "scheduler_wait_s" is "scheduler wait"."""
    return field.removesuffix("_s").replace("_", " ")


def plain_table(first: str, *columns: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table
