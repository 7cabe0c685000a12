"""OpenVINO GenAI behind OpenAI's completions: it comes without a server of its own.

`python openvino_server.py FILE.gguf FOLDER PORT`, in the environment of `openvino-genai`. The model
is converted once, into FOLDER. The engine runs in a process of its own, since a step holds the
interpreter; this one only speaks HTTP. Prompts are token ids. The text of an answer is its token
ids as numbers: nobody is made to wait for a detokeniser, which the numbers flatter.
"""

import asyncio
import contextlib
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai

MODEL = "smollm2-135m"
MAX_MODEL_LEN = 8192  # the model's own
CACHE_GIB = 2
MAX_SEQUENCES = 64
EVENT_STREAM = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
)


# ---- the engine's process


def converted(gguf: Path, folder: Path) -> Path:
    """The model as OpenVINO keeps it, made from the GGUF file the first time."""
    if not (folder / "openvino_model.xml").exists():
        folder.mkdir(parents=True, exist_ok=True)
        place = folder / gguf.name
        if not place.exists():
            place.symlink_to(gguf)
        genai.LLMPipeline(str(place), "CPU", enable_save_ov_model=True)
    return folder


def run_engine(gguf: Path, folder: Path, pipe: Connection, front: Connection) -> None:
    """Take requests (number, ids, most tokens), give lists of (number, ids, over) after steps.

    Without ids a request is one to give up. Ends with the front end, whose side of the pipe it
    must not hold open itself.
    """
    front.close()
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = CACHE_GIB
    scheduler.max_num_seqs = MAX_SEQUENCES
    scheduler.dynamic_split_fuse = True
    scheduler.enable_prefix_caching = False  # no prompt comes twice
    engine = genai.ContinuousBatchingPipeline(str(converted(gguf, folder)), scheduler, "CPU")
    pipe.send(None)  # ready
    running: dict[int, Any] = {}
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            while not running or pipe.poll():
                number, ids, most = pipe.recv()
                if ids is None:
                    if number in running:
                        running.pop(number).cancel()
                else:
                    tensor = openvino.Tensor(np.array([ids], dtype=np.int64))
                    running[number] = engine.add_request(number, tensor, greedy(most))
            engine.step()
            pipe.send(list(news(running)))


def greedy(most: int) -> Any:
    """Exactly so many tokens."""
    config = genai.GenerationConfig()
    config.max_new_tokens, config.min_new_tokens = most, most
    config.ignore_eos, config.do_sample = True, False
    return config


def news(running: dict[int, Any]) -> Iterator[tuple[int, list[int], bool]]:
    for number, handle in list(running.items()):
        ids = []
        while handle.can_read():
            ids += [one for output in handle.read().values() for one in output.generated_ids]
        over = handle.get_status() != genai.GenerationStatus.RUNNING
        if over:
            del running[number]
        if ids or over:
            yield number, ids, over


# ---- the front end


class Front:
    """Hands requests to the engine and its tokens to their connections."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._answers: dict[int, asyncio.Queue[tuple[list[int], bool]]] = {}
        self._num_asked = 0
        asyncio.get_running_loop().add_reader(pipe.fileno(), self._on_news)

    def _on_news(self) -> None:
        try:
            while self._pipe.poll():
                for number, ids, over in self._pipe.recv():
                    if number in self._answers:
                        self._answers[number].put_nowait((ids, over))
        except EOFError:
            os.kill(os.getpid(), signal.SIGTERM)  # no engine, no server

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, one request after the other."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                fields = dict(line.lower().split(":", 1) for line in head[1:] if ":" in line)
                body = await reader.readexactly(int(fields.get("content-length", "0")))
                if head[0].startswith("GET"):
                    listed = [{"id": MODEL, "object": "model", "max_model_len": MAX_MODEL_LEN}]
                    data = json.dumps({"object": "list", "data": listed}).encode()
                    writer.write(
                        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                        b"Content-Length: %d\r\n\r\n%s" % (len(data), data)
                    )
                else:
                    await self._complete(json.loads(body), reader, writer)
                await writer.drain()
        writer.close()

    async def _complete(
        self, body: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Stream one answer; whoever hangs up before its end need not be answered."""
        self._num_asked += 1
        number, answer = self._num_asked, asyncio.Queue[tuple[list[int], bool]]()
        self._answers[number] = answer
        self._pipe.send((number, body["prompt"], body["max_tokens"]))
        writing = asyncio.create_task(self._write(body, answer, writer))
        hung_up = asyncio.create_task(reader.read(1))  # nothing else comes before the answer's end
        await asyncio.wait({writing, hung_up}, return_when=asyncio.FIRST_COMPLETED)
        del self._answers[number]
        hung_up.cancel()
        await asyncio.wait({hung_up})  # one reader at a time
        if not writing.done():
            writing.cancel()
            self._pipe.send((number, None, 0))
            raise ConnectionResetError

    async def _write(
        self,
        body: dict[str, Any],
        answer: "asyncio.Queue[tuple[list[int], bool]]",
        writer: asyncio.StreamWriter,
    ) -> None:
        writer.write(EVENT_STREAM)
        num_tokens, over = 0, False
        while not over:
            ids, over = await answer.get()
            num_tokens += len(ids)
            for token_id in ids:
                writer.write(event({"choices": [{"index": 0, "text": f" {token_id}"}]}))
        counts = {"prompt_tokens": len(body["prompt"]), "completion_tokens": num_tokens}
        writer.write(event({"choices": [], "usage": counts}))
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")


def event(value: dict[str, Any]) -> bytes:
    data = b"data: %s\n\n" % json.dumps(value, separators=(",", ":")).encode()
    return b"%x\r\n%s\r\n" % (len(data), data)


async def serve(pipe: Connection, port: int) -> None:
    front = Front(pipe)
    server = await asyncio.start_server(front.serve, "127.0.0.1", port)
    async with server:
        await server.serve_forever()


def main() -> None:
    gguf, folder, port = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    here, there = multiprocessing.Pipe()
    engine = multiprocessing.Process(
        target=run_engine, args=(gguf, folder, there, here), daemon=True
    )
    engine.start()
    there.close()
    here.recv()
    asyncio.run(serve(here, port))


if __name__ == "__main__":
    main()
