"""Findings for people, in colour on a terminal and plain in a pipe, and as JSON for machines."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from nodeserve.cli.doctor.facts import Facts
from nodeserve.cli.doctor.findings import AREAS, OK, PROBLEM, WARNING, Finding, ranges
from nodeserve.cli.doctor.judge import what_runs, works
from nodeserve.cli.doctor.selftest import Outcome
from nodeserve.nvml import GpuLink, Survey

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

JSON_VERSION = 1  # of the keys; they are listed in docs/doctor.md
PIPE_COLUMNS = 100
ROADS_LEGEND = "NVn: n NVLinks; PIX, PXB, PHB, NODE, SYS: ever farther over PCIe; !: no peer access"
STYLES = {OK: "green", WARNING: "yellow", PROBLEM: "red"}


def as_json(facts: Facts, findings: list[Finding], selftest: Outcome | None) -> dict[str, Any]:
    """Everything, as docs/doctor.md lists it."""
    known = asdict(facts)
    return {
        "version": JSON_VERSION,
        "nodeserve": known["version"],
        "ok": works(findings),
        "runs": None if facts.outlook.refusal else what_runs(facts),
        "findings": [asdict(finding) for finding in findings],
        **{name: known[name] for name in ("machine", "gpus", "software", "socket", "outlook")},
        "selftest": None if selftest is None else asdict(selftest),
    }


def make_console() -> "Console":
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PIPE_COLUMNS
    return console


def show(facts: Facts, findings: list[Finding], console: "Console") -> None:
    """A heading and its lines for each area, and the roads between GPUs."""
    from rich.padding import Padding
    from rich.text import Text

    with console.capture() as paper:
        for area in AREAS:
            if ours := [finding for finding in findings if finding.area == area]:
                console.print(Text(area, style="bold"))
                console.print(area_table(ours))
            if ours and area == "GPUs" and len(facts.gpus.gpus) > 1:
                console.print(Padding(roads_table(facts.gpus, console.is_terminal), (0, 2)))
                console.print(Padding(ROADS_LEGEND, (0, 2)))
    for line in paper.get().splitlines():
        click.echo(line.rstrip())


def verdict(findings: list[Finding]) -> str:
    """The last line: how many there are of each mark that asks for something."""
    counts = {mark: sum(x.mark == mark for x in findings) for mark in (PROBLEM, WARNING)}
    told = [f"{count} {mark}{'' if count == 1 else 's'}" for mark, count in counts.items() if count]
    return ", ".join(told) or "all is well"


def area_table(findings: list[Finding]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1))
    table.add_column(no_wrap=True, min_width=9)
    table.add_column(overflow="fold")
    for finding in findings:
        words = Text(finding.text)
        if finding.advice:
            words.append(f"\n-> {finding.advice}", style="italic")
        table.add_row(Text(f"  {finding.mark}", style=STYLES[finding.mark]), words)
    return table


def roads_table(gpus: Survey, is_terminal: bool) -> "Table":
    """Each pair of GPUs: NVLinks or the road over PCIe, and "!" where peer access is missing."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD if is_terminal else None, pad_edge=False)
    columns = ["GPU", *(str(gpu.index) for gpu in gpus.gpus), "near cores", "NUMA"]
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=heading != "near cores")
    links = {(link.first, link.second): link for link in gpus.links}
    for row in gpus.gpus:
        pairs = (tuple(sorted((row.index, other.index))) for other in gpus.gpus)
        cells = ["-" if a == b else road(links[a, b]) for a, b in pairs]
        node = "" if row.numa_node is None else str(row.numa_node)
        table.add_row(str(row.index), *cells, ranges(row.cpus), node)
    return table


_SHORT = {
    "one board": "PIX",
    "one PCIe switch": "PIX",
    "several PCIe switches": "PXB",
    "PCIe host bridge": "PHB",
    "one NUMA node": "NODE",
    "between CPU sockets": "SYS",
}


def road(link: GpuLink) -> str:
    """As `nvidia-smi topo -m` abbreviates it."""
    name = f"NV{link.num_nvlinks}" if link.num_nvlinks else _SHORT.get(str(link.road), "?")
    return name if link.peer_obstacle is None else f"{name}!"
