"""The node under test, from outside: who its workers are, what they hold, who of them is killed."""

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path
from random import Random
from typing import Any

from bench.soak.ledger import Ledger, Second
from bench.watch import look
from nodeserve import AsyncClient

SETTLE_S = 30.0
ASK_EVERY_S = 0.1
SHM = Path("/dev/shm")


class Node:
    """`pid` is the coordinator's."""

    def __init__(self, client: AsyncClient, pid: int, ledger: Ledger) -> None:
        self.pid = pid
        self._client = client
        self._ledger = ledger

    async def workers(self) -> list[dict[str, Any]]:
        return list((await self._client.stats())["workers"])

    async def tell_seconds(self) -> None:
        """Opens a new second in the ledger every second, with the memory of all processes."""
        while True:
            began_s = time.perf_counter()
            pids = [self.pid, *(one["pid"] for one in await self.workers() if one["pid"])]
            for pid in pids:
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # killed just now
                    self._ledger.now.rss_bytes[pid] = look(pid).rss_bytes
            await asyncio.sleep(max(0.0, 1.0 - (time.perf_counter() - began_s)))
            self._ledger.seconds.append(Second())

    async def audit_now_and_then(self, every_s: float) -> None:
        """Whatever goes on: blocks, requests and records have to add up at any moment."""
        while True:
            await asyncio.sleep(every_s)
            await self.audit()

    async def audit(self) -> None:
        self._ledger.counts["audits"] += 1
        for problem in (await self._client.audit()).problems:
            self._ledger.fault(f"audit: {problem}")

    async def kill_now_and_then(self, per_minute: float, random: Random) -> None:
        """SIGKILL to any worker that serves."""
        while True:
            await asyncio.sleep(random.expovariate(per_minute / 60.0))
            ready = [one for one in await self.workers() if one["state"] == "ready"]
            if ready:
                victim = random.choice(ready)
                os.kill(victim["pid"], signal.SIGKILL)
                self._ledger.killed()
                self._ledger.counts[f"killed: {victim['role']}"] += 1

    async def settle(self, num_workers: int) -> None:
        """Until all workers serve, all blocks are free and nothing is queued, running, parked or
        pinned, and an audit agrees; else a fault says what is left."""
        until_s = time.perf_counter() + SETTLE_S
        while (left := self._left(await self._client.stats(), num_workers)) is not None:
            if time.perf_counter() > until_s:
                self._ledger.fault(f"after the last request: {left}")
                return
            await asyncio.sleep(ASK_EVERY_S)
        await self.audit()

    @staticmethod
    def _left(stats: dict[str, Any], num_workers: int) -> str | None:
        requests = stats["requests"]
        if held := {
            name: requests[name] for name in ("queued", "running", "parked") if requests[name]
        }:
            return f"requests {held}"
        ready = [one for one in stats["workers"] if one["state"] == "ready"]
        for one in ready:
            held = {name: one[name] for name in ("running", "waiting", "pinned") if one[name]}
            if held or one["free_blocks"] != one["num_blocks"]:
                free = f"{one['free_blocks']} of {one['num_blocks']} blocks free"
                return f"worker {one['index']}: {free}, {held}"
        return None if len(ready) == num_workers else f"{len(ready)} of {num_workers} workers ready"

    def num_fds(self, pids: list[int]) -> list[int]:
        """Descriptors of the coordinator, then of each worker."""
        return [look(pid).num_fds for pid in [self.pid, *pids]]

    def names(self) -> list[str]:
        """What it has in /dev/shm."""
        return [one.name for one in SHM.iterdir() if f"nodeserve-{self.pid}-" in one.name]
