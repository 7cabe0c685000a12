"""Workers of one instance as real processes, without a server: a function runs on each.

The processes are forked from one that has torch already, so that each costs milliseconds.
"""

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from nodeserve.layout import Shape
from nodeserve.model.group import Groups, connect
from nodeserve.model.group_memory import Traffic
from nodeserve.shards import Place

TIMEOUT_S = 100.0
TRAFFIC = Traffic(
    num_messages=2, down_bytes=1 << 12, back_bytes=1 << 16
)  # longer ones go in pieces

Task = Callable[..., Any]  # (place, groups, *arguments); importable by name


def run(
    shape: Shape,
    folder: Path,
    task: Task,
    *arguments: Any,
    num_results: int | None = None,
    timeout_s: float = TIMEOUT_S,
) -> list[Any]:
    """What `task` returned on each worker, in rank order; AssertionError with its traceback.

    With `num_results`, of the first workers only. `timeout_s` is how long they wait for each other.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, task.__module__])
    members = []
    for rank in range(shape.num_workers):
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_member,
            args=(theirs, Place.of(shape, rank), str(folder), timeout_s, task, arguments),
        )
        process.start()
        theirs.close()
        members.append((process, ours))
    try:
        return [_result(connection) for _, connection in members[:num_results]]
    finally:
        for process, connection in members:
            connection.close()
            process.kill()
            process.join()


def _result(connection: Connection) -> Any:
    if not connection.poll(TIMEOUT_S):
        raise AssertionError("a rank does not answer")
    kind, value = connection.recv()
    assert kind == "result", value
    return value


def _member(
    connection: Connection,
    place: Place,
    folder: str,
    timeout_s: float,
    task: Task,
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    try:
        groups = Groups.alone()
        if place.shape.num_workers > 1:
            make: Any = distributed.FileStore  # type: ignore[attr-defined]
            store = make(f"{folder}/meeting", place.shape.num_workers)
            groups = connect(place, store, torch.device("cpu"), TRAFFIC, timeout_s)
        connection.send(("result", task(place, groups, *arguments)))
    except BaseException:
        connection.send(("failed", f"rank {place.rank} of {place.shape}: {traceback.format_exc()}"))
        raise
    connection.recv_bytes()  # the others may still be at it; ends with the test's own end
