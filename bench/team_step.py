"""What a step costs more because two workers compute it: the leader's plan, and the collectives.

Run by `python -m bench.step`. A leader and a follower as real processes over real rings:

    plan         the leader is busy for so long with writing a step's plan and publishing it
    arrival      from the beginning of that until the follower has read it, who sleeps before, as
                 between a leader's steps: what is added, since the first collective waits for it
    collectives  of a step in two tensor ranks with nothing computed between them: a sum for the
                 embedding, two for each layer, and the logits of half of the vocabulary

Medians. `python -m bench.team_step --follow JSON` is the follower.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from nodeserve.layout import Shape
from nodeserve.model.group import Group, connect
from nodeserve.model.group_memory import Traffic
from nodeserve.model.inputs import StepInputs
from nodeserve.shards import Place
from nodeserve.wire.channel import (
    ChannelSpec,
    CoordinatorEnd,
    TeamEnd,
    TeamRings,
    TeamSpec,
    WorkerEnd,
)
from nodeserve.wire.team import TO_FOLLOWER, Step
from nodeserve.worker.plans import PlanReader, packed
from nodeserve.worker.team import LeaderTeam

SHAPE = Shape(tp=2)
NO_STAGES = Traffic(0, 0, 0)
TIMEOUT_S = 60.0
SLEEP_S = 1e-3  # the other one has gone to sleep by then


@dataclass(frozen=True, slots=True)
class Sums:
    """What a model's step in two tensor ranks says between them."""

    rows: int
    num_logits: int
    hidden_size: int
    num_layers: int
    vocab_size: int
    repeats: int


@dataclass(frozen=True, slots=True)
class TeamStep:
    """One kind of step in two tensor ranks."""

    name: str
    rows: int
    plan_bytes: int
    plan_us: float
    arrival_us: float
    collectives_us: float

    @property
    def to_collectives(self) -> float:
        """What the plan adds, as a share of what the collectives do."""
        return self.arrival_us / self.collectives_us


class Other:
    """The follower's process, and the leader's end of the rings to it."""

    def __init__(self, process: "subprocess.Popen[str]", team: LeaderTeam, group: Group) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._to, self._from = process.stdin, process.stdout
        self.team = team
        self.group = group

    def tell(self, command: dict[str, Any]) -> None:
        print(json.dumps(command), file=self._to, flush=True)

    def hear(self) -> Any:
        return json.loads(self._from.readline())


def measure(config: Any, steps: dict[str, StepInputs], repeats: int) -> list[TeamStep]:
    """Each of these steps, by name, of a model with this ModelConfig."""
    with _other() as other:
        measured = []
        for name, step in steps.items():
            plan_s, arrival_s = _plans(other, step, repeats)
            sums = Sums(
                *(step.token_ids.numel(), step.logit_rows.numel()),
                *(config.hidden_size, config.num_layers, config.vocab_size),
                repeats,
            )
            other.tell({"sums": asdict(sums)})
            times = (1e6 * one for one in (plan_s, arrival_s, collectives_s(other.group, sums)))
            measured.append(TeamStep(name, sums.rows, len(packed(step)), *times))
        return measured


def _plans(other: Other, step: StepInputs, repeats: int) -> tuple[float, float]:
    """Seconds that the leader is busy with one, and until it is read."""
    other.tell({"plans": repeats})
    began, ended = [], []
    for _ in range(repeats):
        other.hear()
        time.sleep(SLEEP_S)
        began.append(time.perf_counter())
        other.team.step(lambda: packed(step))
        ended.append(time.perf_counter())
    arrived: list[float] = other.hear()
    busy, on_its_way = (
        statistics.median(end - start for start, end in zip(began, ends, strict=True))
        for ends in (ended, arrived)
    )
    return busy, on_its_way


def collectives_s(group: Group, sums: Sums) -> float:
    """Seconds of one step's, in two ranks that both call this."""
    hidden = torch.ones(sums.rows, sums.hidden_size)
    last = torch.ones(sums.num_logits, sums.hidden_size)
    logits = torch.ones(sums.num_logits, sums.vocab_size // group.size)
    whole = torch.empty(group.size, *logits.shape) if group.rank == 0 else None
    times = []
    for _ in range(sums.repeats):
        start = time.perf_counter()
        for _ in range(2 * sums.num_layers):
            group.all_reduce(hidden)
        group.all_reduce(last)
        group.gather(logits, whole)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


# -- two processes --------------------------------------------------------------------------------


@contextlib.contextmanager
def _other() -> Iterator[Other]:
    node = f"{os.getpid():x}"
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        leader, follower = (
            stack.enter_context(CoordinatorEnd(node, f"bench{index}")) for index in range(2)
        )
        rings = stack.enter_context(TeamRings(node, "team", leader.spec, follower.spec))
        specs = {"channel": asdict(follower.spec), "team": asdict(rings.spec), "folder": folder}
        process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-m", "bench.team_step", "--follow", json.dumps(specs)],
                pass_fds=(*follower.inherited_fds, *rings.inherited_fds),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        stack.callback(process.kill)
        end = stack.enter_context(WorkerEnd(_own(leader.spec)))
        team_end = stack.enter_context(TeamEnd(_own(rings.spec), True, end))
        team = LeaderTeam([team_end], end.inbox.wait, lambda: None)
        yield Other(process, team, _meet(folder, 0))


def _own(spec: Any) -> Any:
    """The same with descriptors of its own: an end closes those that it was given."""
    values = {
        name: os.dup(value) if name.endswith("fd") else value
        for name, value in asdict(spec).items()
    }
    return type(spec)(**values)


def _meet(folder: str, rank: int) -> Group:
    torch.set_num_threads(1)
    store = distributed.FileStore(str(Path(folder) / "meeting"), 2)  # type: ignore[attr-defined]
    return connect(Place.of(SHAPE, rank), store, torch.device("cpu"), NO_STAGES, TIMEOUT_S).tp


def follow(channel: dict[str, Any], team: dict[str, Any], folder: str) -> None:
    """Do what is told on stdin, until it ends."""
    with (
        WorkerEnd(ChannelSpec(**channel)) as end,
        TeamEnd(TeamSpec(**team), False, end) as rings,
    ):
        group, reader = _meet(folder, 1), PlanReader()
        for line in sys.stdin:
            command = json.loads(line)
            if "sums" in command:
                collectives_s(group, Sums(**command["sums"]))
                continue
            arrived = [_read_one(end, rings, reader) for _ in range(command["plans"])]
            print(json.dumps(arrived), flush=True)


def _read_one(end: WorkerEnd, rings: TeamEnd, reader: PlanReader) -> float:
    """When the next plan was read."""
    print("null", flush=True)
    while True:
        end.inbox.wait(TIMEOUT_S)
        for record in rings.inbox.drain():
            message = TO_FOLLOWER.decode(record)
            assert isinstance(message, Step)
            reader.read(message.data)
            return time.perf_counter()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--follow", required=True)
    follow(**json.loads(parser.parse_args().follow))
