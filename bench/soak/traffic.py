"""Who comes when: a seed decides it all, the node's answers only how long things take."""

import asyncio
import math
from collections.abc import Callable, Coroutine
from random import Random
from typing import Any

from bench.soak.answers import Answer, whole
from bench.soak.ledger import Ledger
from bench.soak.line import Ask, Line, connect
from nodeserve import AsyncClient
from nodeserve.errors import InvalidRequest, NodeServeError, WorkerLost
from nodeserve.text import Tokenizer
from nodeserve.types import Sampling
from nodeserve.worker.executor_sim import Tokens

KINDS = {  # how often each comes
    "greedy": 30,
    "seeded": 15,
    "sampled": 5,
    "stop token": 8,
    "stop string": 4,
    "one token": 4,
    "long prompt": 3,
    "with limits": 10,
    "hopeless": 2,
    "cancelled": 8,
    "cancelled at once": 3,
    "disconnected": 3,
    "slow reader": 3,
    "invalid": 2,
}
PROMPT, OUTPUT = (150, 2000), (60, 400)  # tokens: mean and most
LONG = (3000, 12000)
BURST_EVERY_S, BURST = 15.0, 40
SLOW_S = (0.5, 4.0)  # that a slow reader does not read
MANY = 6  # requests of a connection of its own


class Traffic:
    """`rate` requests a second on average, and bursts on top, until stopped."""

    def __init__(
        self, path: str, ledger: Ledger, tokens: Tokens, server: dict[str, Any], seed: int
    ) -> None:
        self._path = path
        self._ledger = ledger
        self._tokens = tokens
        self._vocab_size = int(server["vocab_size"])
        self._max_len = int(server["max_model_len"])
        self._random = Random(seed)
        self._tokenizer = Tokenizer.load(server["tokenizer"])
        self._tasks: set[asyncio.Task[None]] = set()
        self.main: Line
        self.client = AsyncClient(path)
        self.stopped = False

    async def open(self) -> None:
        """The connections that stay."""
        self.main = await connect(self._path, self._ledger)
        await self.client.stats()

    async def run(self, rate: float, seconds: float) -> None:
        """Open loop: nothing waits for an answer."""
        loop = asyncio.get_running_loop()
        due_s = began_s = loop.time()
        burst_s = began_s + BURST_EVERY_S / 2
        while due_s < began_s + seconds and not self.stopped:
            await asyncio.sleep(max(0.0, due_s - loop.time()))
            self.one()
            if due_s >= burst_s:
                burst_s += BURST_EVERY_S
                for _ in range(BURST):
                    self.one()
            due_s += self._random.expovariate(rate)

    async def finish(self, limit_s: float) -> None:
        """Wait for the ends of all; what does not end in time is a fault."""
        waits = [asyncio.ensure_future(self.main.idle.wait()), *self._tasks]
        _, pending = await asyncio.wait(waits, timeout=limit_s)
        if pending:
            self._ledger.fault(f"{self._ledger.num_open} requests did not end in {limit_s:g} s")
        for one in pending:
            one.cancel()
        await asyncio.gather(*waits, return_exceptions=True)

    async def close(self) -> None:
        self.main.hang_up()
        await self.main.closed.wait()
        await self.client.aclose()

    def one(self) -> None:
        """One more client does what its kind does."""
        (kind,) = self._random.choices(list(KINDS), list(KINDS.values()))
        self._ledger.counts[kind] += 1
        own: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
            "stop string": self._stop_string,
            "disconnected": self._disconnected,
            "slow reader": self._slow_reader,
        }
        if kind in own:
            task = asyncio.create_task(self._guarded(own[kind]()))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            self.main.send(self._ask(kind))
            self.main.abort_now()

    # ---- kinds

    def _ask(self, kind: str) -> Ask:
        random = self._random
        sampling: dict[str, Any] = {"max_tokens": self._length(*OUTPUT), "ignore_eos": True}
        prompt = self._prompt(*(LONG if kind == "long prompt" else PROMPT))
        temperature = 0.8 if kind in ("seeded", "sampled") else 0.0
        if kind == "seeded":
            sampling["seed"] = random.randrange(2**60)
        if kind == "one token":
            sampling["max_tokens"] = 1
        if random.random() < 0.1:
            sampling["logprobs"] = random.randrange(4)
        if kind == "invalid":
            prompt[random.randrange(len(prompt))] = self._vocab_size + random.randrange(9)
        settings = Sampling(temperature=temperature, **sampling)
        if kind == "stop token":
            stream = whole(prompt, settings, self._tokens)
            settings = Sampling(
                temperature=temperature, stop_token_ids=(random.choice(stream),), **sampling
            )
        ask = Ask(Answer(prompt, settings, self._tokens, self._vocab_size))
        ask.priority = random.choice((0, 0, 0, 1, -1))
        match kind:
            case "with limits":
                ask.slo = {"ttft_ms": 1000.0, "tpot_ms": 100.0}
            case "hopeless":
                ask.slo = {"ttft_ms": 1e-3}
            case "cancelled":
                ask.abort_after = random.randrange(1, 1 + settings.max_tokens)
            case "cancelled at once":
                ask.abort_after = 0
            case "invalid":
                ask.ends_with = InvalidRequest.code
        return ask

    async def _disconnected(self) -> None:
        """In the middle of several requests, wherever each stands."""
        after = self._random.randrange(1, 200)
        line = await self._line_of_many()
        line.on_tokens = lambda num_tokens: line.hang_up() if num_tokens >= after else None
        await line.idle.wait()
        line.hang_up()
        await line.closed.wait()

    async def _slow_reader(self) -> None:
        """Reads nothing for a while; then all has to be there."""
        silent_s = self._random.uniform(*SLOW_S)
        line = await self._line_of_many()
        line.pause()
        await asyncio.sleep(silent_s)
        line.resume()
        await line.idle.wait()
        line.hang_up()
        await line.closed.wait()

    async def _line_of_many(self) -> Line:
        asks = [self._ask("greedy") for _ in range(self._random.randrange(1, MANY))]
        line = await connect(self._path, self._ledger)
        for ask in asks:
            line.send(ask)
        return line

    async def _stop_string(self) -> None:
        """Text ends before a piece of the very text that comes; the rest is aborted on the way."""
        prompt = self._prompt(*PROMPT)
        settings = Sampling(max_tokens=self._length(*OUTPUT), temperature=0.0, ignore_eos=True)
        text = self._tokenizer.decode(whole(prompt, settings, self._tokens), continues=True)
        at = self._random.randrange(len(text)) if text else 0
        stop = text[at : at + self._random.randrange(1, 4)]
        if not stop:
            return
        expected = text[: text.index(stop)]
        kills_before = self._ledger.num_kills
        try:
            done = await self.client.generate(
                prompt,
                max_tokens=settings.max_tokens,
                temperature=0.0,
                ignore_eos=True,
                stop=stop,
            )
        except WorkerLost:
            if self._ledger.may_be_lost(kills_before):
                return
            raise
        if done.text != expected or done.finish_reason != "stop":
            self._ledger.fault(f"text up to {stop!r}: {done.finish_reason}, {done.text[-40:]!r}")
        self._ledger.counts["ended: stop string"] += 1

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except (NodeServeError, OSError) as error:
            self._ledger.fault(f"{type(error).__name__}: {error}")

    # ---- lengths

    def _prompt(self, mean: int, most: int) -> list[int]:
        count = min(self._length(mean, most), self._max_len - OUTPUT[1] - 1)
        low, high = self._vocab_size // 16, self._vocab_size - self._vocab_size // 16
        return [self._random.randrange(low, high) for _ in range(count)]

    def _length(self, mean: int, most: int) -> int:
        """Log-normal with a sigma of 1."""
        return max(1, min(most, round(self._random.lognormvariate(math.log(mean) - 0.5, 1.0))))
