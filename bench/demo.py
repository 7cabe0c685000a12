"""`make demo`: a server on two CPU workers, six prompts at once, and what it did with them.

One worker prefills, the other pulls the KV pages and decodes. The answers stream through the Unix
socket while they are written; in the end all is stopped, and what could be left is looked for.
"""

import asyncio
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from nodeserve import AsyncClient
from nodeserve.cli.launch import start_process
from nodeserve.cli.progress import start_report
from nodeserve.client import Chunk
from nodeserve.config import EngineConfig

LAYOUT = "1p1d"
MAX_TOKENS = 72
STOP_TIMEOUT_S = 20.0
PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Explain in two sentences why the sky is blue.",
    "Write a haiku about the sea in winter.",
    "List three uses of a paper clip.",
    "Was ist der Unterschied zwischen einem Fluss und einem See?",
    "Summarise in one sentence: a server read every prompt with one worker and wrote every answer"
    " with another. The pages of keys and values that the first had computed were copied by the"
    " second, so that neither had to wait for the other's work and both stayed busy all the time.",
)

HEADINGS = (
    "",
    "prompt\ntokens",
    "output\ntokens",
    "TTFT\nms",
    "TPOT\nms",
    "prefill\nworker",
    "decode\nworker",
    "handoff\nKiB",
    "handoff\nms",
)

console = Console(highlight=False)


@dataclass
class Answer:
    """One request as the screen sees it."""

    prompt: str
    text: str = ""
    last: Chunk = field(default_factory=Chunk)

    @property
    def done(self) -> bool:
        return self.last.finish_reason is not None


# ---- the server


def start_server(socket: Path, log_path: Path) -> "subprocess.Popen[bytes]":
    """`nodeserve start` as a process; bars until it is ready."""
    console.print(f"[bold]$ nodeserve start --layout {LAYOUT} --socket {socket}[/bold]")
    with start_report() as report:
        return start_process(EngineConfig(layout=LAYOUT, socket=str(socket)), log_path, report)


def leftovers(socket: Path, pids: list[int]) -> list[str]:
    """Everything of this server that still exists."""
    found = [f"process {pid}" for pid in pids if Path(f"/proc/{pid}").exists()]
    found += [f"socket {socket}"] if socket.exists() else []
    shm = Path("/dev/shm")
    return found + [str(path) for path in shm.glob(f"*nodeserve-{pids[0]}-*")]


# ---- the prompts


async def ask_all(client: AsyncClient, answers: list[Answer]) -> None:
    """All prompts at once, shown while they stream."""
    with screen(answers) as changed:
        async with asyncio.TaskGroup() as group:
            for answer in answers:
                group.create_task(ask(client, answer, changed))


async def ask(client: AsyncClient, answer: Answer, changed: Callable[[], None]) -> None:
    messages = [{"role": "user", "content": answer.prompt}]
    async for chunk in client.chat(messages, max_tokens=MAX_TOKENS, temperature=0.0, stream=True):
        answer.text += chunk.text
        answer.last = chunk
        changed()


class Paper:
    """For a pipe: one after the other. The first that is not finished streams, the rest wait."""

    def __init__(self, answers: list[Answer]) -> None:
        self._answers = answers
        self._place = 0
        self._written: int | None = None  # characters of that one; None: not even its prompt

    def update(self) -> None:
        while self._place < len(self._answers):
            answer = self._answers[self._place]
            if self._written is None:
                print(f"\n[{self._place + 1}] {answer.prompt}\n    ", end="")
                self._written = 0
            print(answer.text[self._written :].replace("\n", "\n    "), end="", flush=True)
            self._written = len(answer.text)
            if not answer.done:
                return
            print()
            self._place, self._written = self._place + 1, None


@contextlib.contextmanager
def screen(answers: list[Answer]) -> Iterator[Callable[[], None]]:
    """What to call when an answer has grown. On a terminal all of them grow side by side."""
    if not console.is_terminal:
        yield Paper(answers).update
        return
    with Live(console=console, transient=True, refresh_per_second=12) as live:
        yield lambda: live.update(panels(answers, max_lines=6))
    console.print(panels(answers, max_lines=None))


def panels(answers: list[Answer], max_lines: int | None) -> Group:
    """Two answers in a row; with `max_lines` only the end of each."""
    grid = Table.grid(expand=True)
    grid.add_column(ratio=1)
    grid.add_column(ratio=1)
    width = console.width // 2 - 4
    cells = [panel(number, answer, width, max_lines) for number, answer in enumerate(answers, 1)]
    for left in range(0, len(cells), 2):
        grid.add_row(*cells[left : left + 2])
    return Group(grid)


def panel(number: int, answer: Answer, width: int, max_lines: int | None) -> Panel:
    lines = Text(answer.text).wrap(console, width)
    title = Text(f"{number}  {answer.prompt}", overflow="ellipsis", no_wrap=True)
    title.truncate(width - 2, overflow="ellipsis")
    return Panel(
        Text("\n").join(lines[-max_lines:] if max_lines else lines),
        title=title,
        title_align="left",
        border_style="green" if answer.done else "dim",
        height=max_lines + 2 if max_lines else None,
    )


# ---- the numbers


def report(answers: list[Answer], wall_s: float) -> None:
    table = Table(box=box.SIMPLE_HEAD, title="what each request went through", title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for number, answer in enumerate(answers, 1):
        table.add_row(str(number), *row(answer.last))
    console.print(table)
    usages = [answer.last.usage for answer in answers if answer.last.usage]
    written = sum(usage.completion_tokens for usage in usages)
    moved = sum(answer.last.timings.handoff_bytes for answer in answers if answer.last.timings)
    console.print(
        f"{len(answers)} requests at once: {sum(usage.prompt_tokens for usage in usages)} tokens"
        f" read, {written} written in {wall_s:.2f} s ({written / wall_s:.0f} tokens/s),"
        f" {moved / 2**20:.1f} MiB of KV pages handed over",
        soft_wrap=True,
    )


def row(last: Chunk) -> list[str]:
    usage, timings, latency = last.usage, last.timings, last.latency
    assert usage and timings and latency and latency.ttft_s is not None
    return [
        str(usage.prompt_tokens),
        str(usage.completion_tokens),
        f"{1e3 * latency.ttft_s:.0f}",
        f"{1e3 * latency.tpot_s:.1f}" if latency.tpot_s is not None else "-",
        str(timings.prefill_worker),
        str(timings.decode_worker),
        f"{timings.handoff_bytes / 1024:.0f}",
        f"{1e3 * timings.handoff_s:.2f}",
    ]


async def demonstrate(socket: Path) -> list[int]:
    """Ask, show, stop; the pids of the server and its workers."""
    answers = [Answer(prompt) for prompt in PROMPTS]
    async with AsyncClient(socket) as client:
        stats = await client.stats()
        began_s = time.perf_counter()
        await ask_all(client, answers)
        report(answers, time.perf_counter() - began_s)
        await client.stop_server()
    return [stats["pid"], *(worker["pid"] for worker in stats["workers"])]


def run(folder: Path) -> list[str]:
    """The demo; what it left behind."""
    socket = folder / "nodeserve.sock"
    process = start_server(socket, folder / "nodeserve.log")
    try:
        pids = asyncio.run(demonstrate(socket))
    finally:
        process.terminate()  # it has already been told to stop, unless something went wrong
        process.wait(STOP_TIMEOUT_S)
    return leftovers(socket, pids)


def main() -> int:
    began_s = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="nodeserve-demo-") as folder:
        try:
            left = run(Path(folder))
        except click.ClickException as problem:
            console.print(f"Error: {problem.message}", style="red", markup=False)
            return 1
    if left:
        console.print(f"left behind: {', '.join(left)}", style="red")
        return 1
    console.print(
        "stopped: no process, socket or shared memory is left."
        f" {time.perf_counter() - began_s:.1f} s in all."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
