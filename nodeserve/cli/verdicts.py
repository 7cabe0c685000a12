"""What `nodeserve status --health` and `--audit` say: a verdict, and its exit code."""

import json
from dataclasses import asdict
from typing import Any

import click

from nodeserve.client import Audit, Health

YES, NO = 0, 1  # exit codes; a server that does not answer is a NO as well


def health_verdict(health: Health, as_json: bool) -> int:
    """Print it; 0 if the server serves, if with less than it has."""
    if as_json:
        click.echo(json.dumps(asdict(health)))
    else:
        click.echo(health_line(health.state, health.reasons))
    return YES if health.ready else NO


def health_line(state: str, reasons: tuple[str, ...] | list[str]) -> str:
    return state + (": " + "; ".join(reasons) if reasons else "")


def audit_verdict(audit: Audit, as_json: bool) -> int:
    """Print it; 0 if everything adds up."""
    if as_json:
        click.echo(json.dumps({**asdict(audit), "adds_up": audit.adds_up}))
    else:
        for line in audit_lines(audit):
            click.echo(line)
    return YES if audit.adds_up else NO


def audit_lines(audit: Audit) -> list[str]:
    """The verdict, what differs, and the figures of each worker."""
    if audit.adds_up:
        phases = ", ".join(f"{count} {phase}" for phase, count in audit.requests.items())
        lines = [f"adds up  requests: {phases or 'none'}"]
    else:
        lines = ["does not add up", *(f"  {problem}" for problem in audit.problems)]
    return lines + [_worker_line(worker) for worker in audit.workers]


def _worker_line(worker: dict[str, Any]) -> str:
    stages = ("waiting", "running", "pulling", "pinned")
    held = ", ".join(f"{worker[stage]} {stage}" for stage in stages if worker[stage])
    return (
        f"worker {worker['index']} ({worker['role']})  {worker['num_blocks']} blocks:"
        f" {worker['free_blocks']} free, {worker['held_blocks']} held"
        f"  requests: {held or 'none'}"
        f"  records: {worker['records_to_it']} to it, {worker['records_from_it']} from it"
    )
