"""`nodeserve status` and `nodeserve stop`."""

import functools
import json
import os
import select
import signal
import socket as socketlib
import struct
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nodeserve.cli.talk import CONNECT_TIMEOUT_S, socket_option
from nodeserve.cli.verdicts import audit_verdict, health_line, health_verdict
from nodeserve.client import Client
from nodeserve.errors import ConnectionLost
from nodeserve.views import History

if TYPE_CHECKING:
    from rich.table import Table

END_TIMEOUT_S = 60.0  # from a server's goodbye to the end of its process
CUT_OFF = 3  # exit code, as the server's
ANSWER_TIMEOUT_S = 3.0  # a server that is ready answers in milliseconds
_PEER = struct.Struct("3i")  # struct ucred: pid, uid, gid

_COLUMNS = (  # heading, cell: 80 columns hold all of them
    ("id", "{index}"),
    ("role", "{role}"),
    ("rank", "{instance}.{rank}"),
    ("gpu", "{gpu}"),
    ("state", "{state}"),
    ("pid", "{pid}"),
    ("run", "{running}"),
    ("wait", "{waiting}"),
    ("pin", "{pinned}"),
    ("free\nblocks", "{free_blocks}/{num_blocks}"),
    ("steps", "{steps}"),
    ("step\nms", "{step_ms:.1f}"),
    ("tokens", "{tokens}"),
    ("hand-\noffs", "{handoffs}"),
    ("threads", "{threads}"),
)


@click.command()
@socket_option
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
@click.option("--health", is_flag=True, help="Say only whether it serves; if not, exit code 1.")
@click.option(
    "--audit",
    is_flag=True,
    help="Check that blocks, requests and records add up between the server and its workers; if"
    " not, exit code 1.",
)
def status(socket: str | None, as_json: bool, health: bool, audit: bool) -> None:
    """Show workers, queues, free blocks and rates."""
    if health and audit:
        raise click.UsageError("--health and --audit are two questions: ask one at a time")
    timeout_s = ANSWER_TIMEOUT_S if health else CONNECT_TIMEOUT_S
    with Client(socket, connect_timeout_s=timeout_s) as client:
        if health:
            sys.exit(health_verdict(client.health(), as_json))
        if audit:
            sys.exit(audit_verdict(client.audit(), as_json))
        stats = client.stats()
        if as_json:
            click.echo(json.dumps({**stats, "socket": str(client.socket_path)}))
            return
        for line in summary(stats, str(client.socket_path)):
            click.echo(line)
        show_table(workers_table(stats["workers"]))


def summary(stats: dict[str, Any], path: str) -> list[str]:
    """The node in a few lines."""
    requests, rates = stats["requests"], stats["rates"]
    return [
        f"{stats['model']}  {stats['layout']}  pid {stats['pid']}"
        f"  up {_duration(stats['uptime_s'])}  {path}",
        *how_it_is(stats.get("health", {})),
        "requests  " + "  ".join(f"{count} {name}" for name, count in requests.items()),
        f"rates     {rates['prompt_tokens_per_s']:.1f} prompt tokens/s"
        f"  {rates['output_tokens_per_s']:.1f} output tokens/s"
        f"  {rates['requests_per_s']:.2f} requests/s",
        f"goodput   {History().add(stats).verdict}",
        *how_requests_leave(stats["dispatch"]),
        *how_they_run(stats["workers"]),
        *how_they_fare(stats["workers"]),
    ]


def how_it_is(health: dict[str, Any]) -> list[str]:
    """Nothing, where all is well."""
    reasons = health.get("reasons", [])
    return [f"health    {health_line(health['state'], reasons)}"] if reasons else []


def how_requests_leave(dispatch: dict[str, Any]) -> list[str]:
    """The policy at work, and who waits for it."""
    words = [dispatch["admission"]]
    if dispatch["falling_back"]:
        words = ["shortest-queue, for the window cannot be trusted now"]
    elif dispatch["window_ms"]:
        words.append(f"every {dispatch['window_ms']:.1f} ms")
    if dispatch["pass_ms"] is not None:
        words.append(f"a pass takes {dispatch['pass_ms']:.1f} ms")
    for state in ("suspect", "lost"):
        which = [str(one["instance"]) for one in dispatch["instances"] if one["state"] == state]
        words += [f"{state}: instance {', '.join(which)}"] if which else []
    lines = ["dispatch  " + "  ".join([*words, f"decode by {dispatch['decode_allocation']}"])]
    if waiting := dispatch["queue"]:
        lines.append("queue     " + "  ".join(map(_class_line, waiting)))
    return lines


def _class_line(waiting: dict[str, Any]) -> str:
    effort = " best effort" if waiting["best_effort"] else ""
    return f"{waiting['requests']} of priority {waiting['priority']}{effort}"


def how_they_run(workers: list[dict[str, Any]]) -> list[str]:
    """Kernels, and how pages travel where they do; too long for cells, and mostly alike."""
    told = ["kernels"]
    if any(worker["role"] == "prefill" for worker in workers):
        told.append("handoff")
    lines = []
    for name in told:
        kinds: dict[str, list[str]] = {}
        for worker in workers:
            kinds.setdefault(worker.get(name) or "", []).append(str(worker["index"]))
        for words, indices in kinds.items():
            whose = f" (worker {', '.join(indices)})" if len(kinds) > 1 else ""
            lines += [f"{name:<10}{words}{whose}"] if words else []
    return lines


def how_they_fare(workers: list[dict[str, Any]]) -> list[str]:
    """A line for each worker that has ended before, is away, or does more than its own."""
    lines = []
    for worker in workers:
        words = []
        if worker["state"] != "ready":
            wait_s = worker.get("restart_in_s")
            words.append(worker["state"] + ("" if wait_s is None else f" in {wait_s:.1f} s"))
        if worker.get("acting", worker["role"]) != worker["role"]:
            words.append("takes prompts and decodes, since nobody else does one of them")
        if restarts := worker.get("restarts"):
            words.append(f"restarts: {restarts}")
        if reason := worker.get("reason"):
            words.append(f"last end: {reason}")
        if words:
            lines.append(f"worker {worker['index']:<3}" + "  ".join(words))
    return lines


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def workers_table(workers: list[dict[str, Any]]) -> "Table":
    """A row for each worker, with its GPU or its threads, or its place among several ranks."""
    from rich import box
    from rich.table import Table

    if any(worker.get("rank") for worker in workers):
        shown = "rank"
    else:
        shown = "gpu" if any(worker.get("gpu") is not None for worker in workers) else "threads"
    hidden = {"rank", "gpu", "threads"} - {shown}
    columns = [column for column in _COLUMNS if column[0] not in hidden]
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for heading, _ in columns:
        table.add_column(heading, overflow="fold")
    for worker in workers:
        table.add_row(*(cell.format(**worker) for _, cell in columns))
    return table


def show_table(table: "Table") -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 200  # a file or a pipe has no width to fit
    console.print(table)


@click.command()
@socket_option
@click.option("--drain", is_flag=True, help="Let running requests finish first.")
@click.option(
    "--timeout",
    "timeout_s",
    type=float,
    help="With --drain: seconds after which what still runs is ended, with exit code 3."
    " [default, and at most: the server's --drain-timeout]",
)
def stop(socket: str | None, drain: bool, timeout_s: float | None) -> None:
    """Stop the server and wait until its process and socket are gone."""
    with Client(socket, connect_timeout_s=ANSWER_TIMEOUT_S) as client:
        try:
            pid = int(client.server()["pid"])
            ask = functools.partial(client.stop_server, drain=drain, timeout_s=timeout_s)
        except ConnectionLost:
            loading = listening_pid(client.socket_path)
            if loading is None:
                raise
            pid = loading
            ask = functools.partial(terminated, pid)
        with closing(ProcessEnd(pid)) as end:
            in_time = ask()
            if not end.wait(END_TIMEOUT_S):
                raise click.ClickException(
                    f"the server (pid {pid}) still runs after {END_TIMEOUT_S:g} s:"
                    f" try `kill -KILL {pid}`"
                )
        if client.socket_path.exists():
            raise click.ClickException(f"the server is gone but left {client.socket_path}")
    if not in_time:
        click.echo(f"stopped (pid {pid}); requests still ran after {timeout_s:g} s")
        sys.exit(CUT_OFF)
    click.echo(f"stopped (pid {pid})")


def terminated(pid: int) -> bool:
    """Send SIGTERM to a server that answers nobody; true, as nothing of it ran."""
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        pass
    except PermissionError:
        raise click.ClickException(
            f"the server (pid {pid}) does not answer yet, and only its own user can stop it now"
        ) from None
    return True


def listening_pid(path: Path) -> int | None:
    """Who listens on a socket, whether it answers yet or still loads; None: nobody."""
    with socketlib.socket(socketlib.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return None
        peer = probe.getsockopt(socketlib.SOL_SOCKET, socketlib.SO_PEERCRED, _PEER.size)
    pid: int = _PEER.unpack(peer)[0]
    return pid


class ProcessEnd:
    """Waits for the end of a process that is not our child."""

    def __init__(self, pid: int) -> None:
        try:
            self._descriptor: int | None = os.pidfd_open(pid)
        except ProcessLookupError:
            self._descriptor = None

    def wait(self, timeout_s: float) -> bool:
        """True when the process has ended within the time."""
        if self._descriptor is None:
            return True
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        return bool(poll.poll(1e3 * timeout_s))

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
