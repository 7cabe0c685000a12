"""`nodeserve doctor --selftest`: a tiny model through `1m` and `1p1d` must give the same tokens.

Each layout is a real `nodeserve start` in a session of its own, on a socket in a temporary folder,
and has a deadline. Whatever happens, Ctrl-C included, the server is ended before this returns, and
what it could have left is looked for.
"""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import click

from nodeserve.cli.launch import open_log, spawn, tail, watch
from nodeserve.cli.progress import StartReport
from nodeserve.cli.show import ProcessEnd
from nodeserve.client import Client
from nodeserve.config import EngineConfig
from nodeserve.errors import NodeServeError

LAYOUTS = ("1m", "1p1d")
LAYOUT_TIMEOUT_S = (
    240.0  # for one server, from start to stop; a cold GPU compiles kernels meanwhile
)
STOP_TIMEOUT_S = 15.0
NUM_TOKENS = 24
# One at a time: then each step computes the same shapes in both layouts, so that also on devices
# whose sums depend on the batch the same tokens must come out. The third prompt takes several
# blocks, on CPUs also several steps.
TEXTS = (
    "The capital of France is",
    "One, two, three, four, five, six,",
    "A worker reads the prompt, another one writes the answer. " * 16 + "In short:",
    "Der Himmel ist blau, das Gras ist grün und der Schnee ist",
)
FIRST_WORDS = " Paris"  # what the demo model goes on with after the first text
TINY_MODEL: dict[str, Any] = {  # for machines without the demo model; its weights are made up
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
}
TINY_LENGTHS = (1, 17, 200, 64)  # tokens of each prompt


@dataclass(frozen=True, slots=True)
class Run:
    """One layout's server and what it answered."""

    layout: str
    error: str | None = None
    start_s: float = 0.0
    answer_s: float = 0.0  # all prompts, one after another
    kernels: str = ""
    handoff: str = ""
    num_handoffs: int = 0
    handoff_bytes: int = 0
    tokens: list[list[int]] = field(default_factory=list)  # of each prompt
    texts: list[str] = field(default_factory=list)  # empty without a tokenizer
    left_behind: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Both runs; `judge_selftest` says what they are worth."""

    device: str
    gpus: str | None
    model: str
    is_demo_model: bool
    runs: tuple[Run, ...]


def selftest(
    device: str, gpus: Sequence[int], demo_model: str | None, make_report: Callable[[], StartReport]
) -> Outcome:
    """Runs both layouts; on one GPU its two workers share it."""
    with tempfile.TemporaryDirectory(prefix="nodeserve-doctor-") as folder, stoppable():
        base = EngineConfig(
            model=None if demo_model else str(write_tiny_model(Path(folder, "tiny"))),
            load_format="auto" if demo_model else "dummy",
            device=device,
            socket=str(Path(folder, "node.sock")),
            max_model_len=512,
            kv_memory=64 << 20,
            max_num_seqs=8,
        )
        pair = [*gpus, *gpus][:2] if device == "cuda" else []
        runs = []
        for layout in LAYOUTS:
            chosen = ",".join(map(str, pair[: 1 if layout == "1m" else 2])) or None
            config = replace(base, layout=layout, gpus=chosen)
            with make_report() as report:
                runs.append(run(config, report))
    shown = ",".join(map(str, pair)) or None
    model = demo_model or "a tiny Llama with random weights"
    return Outcome(device, shown, model, demo_model is not None, tuple(runs))


def write_tiny_model(folder: Path) -> Path:
    """A folder with nothing but a shape, for `--load-format dummy`."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY_MODEL))
    return folder


def run(config: EngineConfig, report: StartReport, timeout_s: float = LAYOUT_TIMEOUT_S) -> Run:
    """One server from start to stop; its failures are in the result."""
    assert config.socket is not None and config.layout is not None
    socket, log_path = Path(config.socket), Path(config.socket).with_suffix(".log")
    pids: list[int] = []
    began_s = time.perf_counter()
    with open_log(log_path) as log:
        process, events = spawn(config, log)
    done = Run(config.layout)
    try:
        with killed_after(process, timeout_s) as late:
            try:
                done = _serve(config.layout, process, events, report, socket, began_s, pids)
            except NodeServeError as problem:
                done = replace(done, error=str(problem))
            except _NotReady:
                done = replace(done, error=_last_words(log_path))
        if late.is_set():
            done = replace(done, error=f"took more than {timeout_s:g} s and was ended")
    finally:
        end(process)
    return replace(done, left_behind=leftovers(socket, process.pid, pids))


class _NotReady(Exception):
    """The server ended first."""


def _serve(
    layout: str,
    process: "subprocess.Popen[bytes]",
    events: int,
    report: StartReport,
    socket: Path,
    began_s: float,
    pids: list[int],
) -> Run:
    """Wait until it is ready, ask, and stop it. `pids` gets its workers' as soon as known."""
    if not watch(events, report):
        raise _NotReady
    start_s = time.perf_counter() - began_s
    with Client(socket) as client:
        pids.extend(worker["pid"] for worker in client.stats()["workers"])
        began_s = time.perf_counter()
        answers = list(ask(client))
        answer_s = time.perf_counter() - began_s
        workers = client.stats()["workers"]
        client.stop_server()
    process.wait()
    return Run(
        layout,
        None,
        start_s,
        answer_s,
        "; ".join(dict.fromkeys(worker["kernels"] for worker in workers)),
        "; ".join(dict.fromkeys(worker["handoff"] for worker in workers)),
        sum(worker["handoffs"] for worker in workers),
        sum(worker["handoff_bytes"] for worker in workers),
        [token_ids for token_ids, _ in answers],
        [text for _, text in answers],
    )


def ask(client: Client) -> Iterator[tuple[list[int], str]]:
    """Each prompt's tokens and text. Without a tokenizer prompts are made of ids."""
    server = client.server()
    options: dict[str, Any] = {"max_tokens": NUM_TOKENS, "temperature": 0.0, "ignore_eos": True}
    prompts: list[Any] = list(TEXTS)
    if Path(server["tokenizer"]).is_dir():  # the tiny model's: there is none
        size = server["vocab_size"]
        prompts = [[(7 * i + 3) % size for i in range(length)] for length in TINY_LENGTHS]
        options["detokenize"] = False
    for prompt in prompts:
        done = client.generate(prompt, **options)
        yield done.token_ids, done.text


def _last_words(log_path: Path) -> str:
    lines = [line for line in tail(log_path).splitlines() if line.strip()]
    last = lines[-1].removeprefix("Error: ") if lines else "no word in its log"
    return f"the server ended before it was ready: {last}"


# ---- the end, whatever comes


@contextlib.contextmanager
def killed_after(process: "subprocess.Popen[bytes]", timeout_s: float) -> Iterator[threading.Event]:
    """Ends the server, workers and all, when the block takes too long; the event says so."""
    late = threading.Event()

    def kill() -> None:
        late.set()
        _kill_session(process)

    timer = threading.Timer(timeout_s, kill)
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()
        timer.join()


def end(process: "subprocess.Popen[bytes]") -> None:
    """Ask, then kill. A second Ctrl-C does not come between."""
    with ignored(signal.SIGINT, signal.SIGTERM):
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                _kill_session(process)
                process.wait()
                sweep()
        process.wait()


def _kill_session(process: "subprocess.Popen[bytes]") -> None:
    """The server leads a group of its own, and its workers are in it."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def leftovers(socket: Path, pid: int, workers: Sequence[int]) -> list[str]:
    """What still exists of a server that has ended; names in shared memory are removed as well."""
    found = []
    for worker in workers:
        with contextlib.closing(ProcessEnd(worker)) as worker_end:
            if not worker_end.wait(STOP_TIMEOUT_S):
                found.append(f"process {worker}")
    if socket.exists():
        found.append(f"socket {socket}")
        socket.unlink()
    return found + [name for name in sweep() if f"nodeserve-{pid}-" in name]


def sweep() -> list[str]:
    """Names in shared memory of servers that are gone, removed."""
    # Here and not above: it loads our extension, which the doctor must be able to do without.
    from nodeserve.wire.channel import sweep_stale

    return sweep_stale()


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM and a closed terminal leave through the clean-up, as Ctrl-C does."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    with handled(leave, signal.SIGTERM, signal.SIGHUP):
        yield


@contextlib.contextmanager
def ignored(*numbers: signal.Signals) -> Iterator[None]:
    with handled(signal.SIG_IGN, *numbers):
        yield


@contextlib.contextmanager
def handled(handler: Any, *numbers: signal.Signals) -> Iterator[None]:
    """Signals are the main thread's; elsewhere nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [(number, signal.signal(number, handler)) for number in numbers]
    try:
        yield
    finally:
        for number, previous in before:
            signal.signal(number, previous)


class SilentPainter:
    """For a report that nobody reads."""

    def line(self, text: str) -> None:
        pass

    def loading(self, event: object) -> None:
        pass

    def close(self) -> None:
        pass


class StderrPainter(SilentPainter):
    """One line for each step of a start."""

    def line(self, text: str) -> None:
        click.echo(text, err=True)
