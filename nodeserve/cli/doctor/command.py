"""The command. Exit codes: 0 what was asked for would run, 1 something has to be repaired."""

import json
import sys

import click

from nodeserve.cli.doctor.collect import collect
from nodeserve.cli.doctor.facts import Facts
from nodeserve.cli.doctor.judge import judge, works
from nodeserve.cli.doctor.judge_gpus import capable
from nodeserve.cli.doctor.judge_selftest import judge_selftest
from nodeserve.cli.doctor.selftest import (
    Outcome,
    SilentPainter,
    StderrPainter,
    selftest,
)
from nodeserve.cli.doctor.show import as_json, make_console, show, verdict
from nodeserve.cli.progress import Painter, StartReport


@click.command()
@click.option(
    "--device",
    type=click.Choice(["auto", "cuda", "cpu"]),
    default="auto",
    show_default=True,
    help="What should run; auto is what `start` takes by default.",
)
@click.option(
    "--selftest",
    "wants_selftest",
    is_flag=True,
    help="Also serve a tiny model as 1m and as 1p1d, and compare the tokens.",
)
@click.option("--json", "wants_json", is_flag=True, help="Print everything as one JSON object.")
def doctor(device: str, wants_selftest: bool, wants_json: bool) -> None:
    """Say what would run on this machine, and what to repair.

    Looks at the driver, the GPUs and the links between them, at torch and our own extensions, and
    at memory and limits. Exits with 0 when what is asked for would run, with 1 when something has
    to be repaired; warnings do not count.
    """
    if sys.stderr.isatty():
        click.echo("looking at this machine; loading torch takes a moment ...", err=True)
    facts = collect(device)
    findings = judge(facts)
    if not wants_json:
        show(facts, findings, make_console())
    outcome = None
    if wants_selftest:
        outcome = run_selftest(facts, SilentPainter() if wants_json else StderrPainter())
        found = judge_selftest(outcome)
        findings += found
        if not wants_json:
            show(facts, found, make_console())
    click.echo(json.dumps(as_json(facts, findings, outcome)) if wants_json else verdict(findings))
    sys.exit(0 if works(findings) else 1)


def run_selftest(facts: Facts, painter: Painter) -> Outcome:
    """On the device that would be used."""
    outlook = facts.outlook
    gpus = [gpu.index for gpu in capable(facts.gpus)]
    return selftest(outlook.device, gpus, outlook.demo_model, lambda: StartReport(painter))
