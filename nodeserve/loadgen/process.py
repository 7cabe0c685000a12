"""A client process: `python -m nodeserve.loadgen`, spoken to over its own pipes.

Messages are pickled, with their length in front. First come the target's options, and their answer
is what the server says about itself; then any number of runs. Payloads are made before the clock
starts, in the process that sends them. The end of the input ends the process.
"""

import asyncio
import contextlib
import gc
import os
import pickle
import resource
import sys
import traceback
from typing import Any, NamedTuple

from nodeserve.errors import ConfigError, NodeServeError
from nodeserve.loadgen.drive import Driver, Load
from nodeserve.loadgen.records import Job, Sample
from nodeserve.loadgen.targets import Target, TargetOptions

LENGTH_BYTES = 8
TELL_S = 0.2  # between messages about requests that have ended


class Prepare(NamedTuple):
    """Make the requests of a run. The answer is Ready."""

    jobs: list[Job]
    run: int


class Go(NamedTuple):
    """Begin at this time of the monotonic clock. The answers are Ended, the last one with `over`.

    `concurrency` None: open loop.
    """

    began_s: float
    drain_s: float
    concurrency: int | None = None


class GiveUp(NamedTuple):
    """End the run now."""


class Ready(NamedTuple):
    """The requests are made."""


class Ended(NamedTuple):
    """Requests that have ended since the last message."""

    samples: list[Sample]
    over: bool = False
    lags_s: tuple[float, ...] = ()


class Failed(NamedTuple):
    """What the process was asked for did not work; `code` "internal": a bug of ours."""

    code: str
    message: str


def packed(message: object) -> bytes:
    data = pickle.dumps(message)
    return len(data).to_bytes(LENGTH_BYTES, "little") + data


async def read_message(reader: asyncio.StreamReader) -> Any:
    """The next message; None at the end."""
    try:
        length = int.from_bytes(await reader.readexactly(LENGTH_BYTES), "little")
        return pickle.loads(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


class Client:
    """The loop of the process."""

    def __init__(self, reader: asyncio.StreamReader, output: int) -> None:
        self._reader = reader
        self._output = output
        self._ended: list[Sample] = []

    async def run(self) -> None:
        options = await read_message(self._reader)
        assert isinstance(options, TargetOptions)
        target = target_of(options)
        try:
            await self._serve(target)
        finally:
            await target.close()

    async def _serve(self, target: Target) -> None:
        self._tell(await target.open())
        loads: list[Load] = []
        message = await read_message(self._reader)
        while message is not None:
            match message:
                case Prepare():
                    loads = [Load(job, target.payload(job, message.run)) for job in message.jobs]
                    gc.collect()
                    self._tell(Ready())
                    message = await read_message(self._reader)
                case Go():
                    driver = Driver(target, message.began_s, self._ended.append)
                    message = await self._one_run(driver, loads, message)
                case _:  # GiveUp: after the run's own end
                    message = await read_message(self._reader)

    async def _one_run(self, driver: Driver, loads: list[Load], go: Go) -> Any:
        """Returns the message that came after it."""
        if go.concurrency is None:
            running = asyncio.create_task(driver.open_loop(loads, go.drain_s))
        else:
            closed = driver.closed_loop(loads, go.concurrency, go.drain_s)
            running = asyncio.create_task(closed)
        asked = asyncio.create_task(read_message(self._reader))
        gc.disable()  # a collection would stop the clock for milliseconds
        try:
            while not running.done():
                await asyncio.wait(
                    {running, asked} if not asked.done() else {running},
                    timeout=TELL_S,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if asked.done() and not running.done():
                    driver.give_up()
                    await running
                self._tell_ended()
        finally:
            gc.enable()
        running.result()
        self._tell(Ended([], True, tuple(driver.lags_s)))
        return await asked

    def _tell_ended(self) -> None:
        if self._ended:
            self._tell(Ended(self._ended.copy()))
            self._ended.clear()

    def _tell(self, message: object) -> None:
        data = memoryview(packed(message))
        while data:
            data = data[os.write(self._output, data) :]


def target_of(options: TargetOptions) -> Target:
    """The client for a URL, or for the node's socket."""
    if options.url is None:
        from nodeserve.loadgen.socket_target import SocketTarget

        return SocketTarget(options)
    try:
        import aiohttp  # noqa: F401
    except ImportError:
        raise ConfigError("--url needs aiohttp: pip install 'nodeserve[bench]'") from None
    from nodeserve.loadgen.openai_target import OpenAITarget

    return OpenAITarget(options)


async def _serve(input_: Any, output: int) -> None:
    reader = asyncio.StreamReader(limit=1 << 30)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), input_)
    try:
        await Client(reader, output).run()
    except NodeServeError as error:
        os.write(output, packed(Failed(error.code, str(error))))
    except BrokenPipeError:
        return  # whoever asked is gone
    except Exception:  # noqa: BLE001 -- told to the process that shows it
        os.write(output, packed(Failed("internal", traceback.format_exc())))


def main() -> None:
    import uvloop

    output = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nothing else may write there
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # one descriptor for each running request
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(_serve(sys.stdin.buffer, output))
