"""A process that owns pools, for sections that read them from another one.

`Owner` is our handle on it: it makes pools filled with known values, exports them, and dies when
told to. The section's own process is the reader.
"""

import contextlib
import multiprocessing
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

from bench.gpu.extension import extension
from bench.gpu.memory import settle, stream_of, view
from bench.gpu.shards import Rank, Whole, values

ANSWER_S = 60.0
CHUNK = 64  # blocks whose values are made at once: they take four times their bytes meanwhile


class Exported(NamedTuple):
    """What a peer needs to open a pool."""

    num_bytes: int
    handle: bytes


class Made(NamedTuple):
    """The pools of one generation, and the event behind which they are written."""

    pools: list[Exported]
    event: bytes


class Owner:
    """The other process; used by one caller at a time."""

    def __init__(self, connection: Connection, process: Any) -> None:
        self._connection = connection
        self.process = process

    def make(self, whole: Whole, ranks: list[Rank], num_blocks: int, generation: int) -> Made:
        """Pools of these ranks with new values; those made before are closed."""
        answer = self._ask("make", whole, ranks, num_blocks, generation)
        assert isinstance(answer, Made)
        return answer

    def close(self) -> None:
        """Close all pools: no reader has them open any more."""
        self._ask("close")

    def _ask(self, *words: Any) -> Any:
        self._connection.send(words)
        if not self._connection.poll(ANSWER_S):
            raise TimeoutError(f"the owner of the pools does not answer {words[0]}")
        answer = self._connection.recv()
        if isinstance(answer, str):
            raise RuntimeError(f"the owner of the pools failed: {answer}")
        return answer


@contextlib.contextmanager
def owner(rehearsal: bool) -> Iterator[Owner]:
    """A new process, gone at the end."""
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_serve, args=(theirs, rehearsal), daemon=True)
    process.start()
    theirs.close()
    try:
        yield Owner(ours, process)
    finally:
        ours.close()
        process.join(ANSWER_S)
        if process.is_alive():
            process.kill()
            process.join()


def _serve(connection: Connection, rehearsal: bool) -> None:
    pools = Pools(rehearsal)
    while True:
        try:
            word, *arguments = connection.recv()
        except EOFError:
            pools.close()
            return
        try:
            connection.send(pools.make(*arguments) if word == "make" else pools.close())
        except Exception as problem:  # noqa: BLE001  the process boundary: the other side says it
            traceback.print_exc()
            connection.send(f"{type(problem).__name__}: {problem}")


class Pools:
    """Inside the owner's process."""

    def __init__(self, rehearsal: bool) -> None:
        self._cuda = extension(rehearsal)
        self._device = torch.device("cpu" if rehearsal else "cuda:0")
        self._held: list[Any] = []

    def make(self, whole: Whole, ranks: list[Rank], num_blocks: int, generation: int) -> Made:
        self.close()
        blocks, exported = torch.arange(num_blocks), []
        for rank in ranks:
            pool = self._cuda.Pool(0, num_blocks * rank.block_bytes(whole))
            self._held.append(pool)
            target = view(pool.address, pool.num_bytes, self._device).view(torch.int16)
            rows = target.view(num_blocks, -1)
            for first in range(0, num_blocks, CHUNK):
                some = blocks[first : first + CHUNK]
                wanted = values(whole, rank, some, generation, self._device)
                rows[first : first + CHUNK].copy_(wanted.flatten(1))
            exported.append(Exported(pool.num_bytes, pool.handle()))
        event = self._cuda.Event(0, interprocess=True)
        self._held.append(event)
        event.record(stream_of(self._device))
        return Made(exported, event.handle())

    def close(self) -> bool:
        settle(self._device)
        while self._held:
            self._held.pop().close()
        return True
