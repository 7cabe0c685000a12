"""When the coordinator's turn comes: once after what came, and at the time that it named."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from nodeserve.coordinator.turns import LEAST_WAIT_S, Turns


class Timer:
    """One call_later."""

    def __init__(self, wait_s: float, ring: Callable[..., None], *args: Any) -> None:
        self.wait_s = wait_s
        self._ring, self._args = ring, args
        self.cancelled = False

    def ring(self) -> None:
        self._ring(*self._args)

    def cancel(self) -> None:
        self.cancelled = True


class Loop:
    """`Turns` at work, with its clock, its timers and its answers in the test's hands."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.answers: list[float | None] = []
        self.calls: list[float] = []
        self.timers: list[Timer] = []
        self.turns = Turns(lambda: self.now_s, self.on_turn)

    def on_turn(self, earliest_s: float) -> float | None:
        self.calls.append(earliest_s)
        return self.answers.pop(0)

    def call_later(self, *args: Any) -> Timer:
        self.timers.append(Timer(*args))
        return self.timers[-1]

    async def answer(self, at_s: float | None) -> None:
        """A turn that names this time, after a wake."""
        self.answers.append(at_s)
        self.turns.wake()
        await self.settle()

    async def settle(self) -> None:
        for _ in range(3):
            await asyncio.sleep(0)

    @property
    def waits(self) -> list[float]:
        return [round(timer.wait_s, 6) for timer in self.timers if not timer.cancelled]


@pytest.fixture
async def loop(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Loop]:
    one = Loop()
    monkeypatch.setattr(asyncio.get_running_loop(), "call_later", one.call_later)
    task = asyncio.ensure_future(one.turns.run())
    yield one
    task.cancel()


async def test_what_comes_together_is_one_turn(loop: Loop) -> None:
    loop.answers = [None, None]
    for _ in range(3):
        loop.turns.wake()
    await loop.settle()
    assert loop.calls == [0.0]
    loop.turns.wake()
    await loop.settle()
    assert loop.calls == [0.0, 0.0] and not loop.timers


async def test_a_named_time_comes(loop: Loop) -> None:
    """Half a millisecond early, as the loop's timers may: it counts as come."""
    await loop.answer(100.25)
    assert loop.waits == [0.25]
    loop.answers.append(None)
    loop.now_s = 100.2495
    loop.timers[0].ring()
    await loop.settle()
    assert loop.calls == [0.0, 100.25] and len(loop.timers) == 1


async def test_a_new_time_takes_the_old_ones_place(loop: Loop) -> None:
    await loop.answer(100.5)
    await loop.answer(100.5)
    assert loop.waits == [0.5] and len(loop.timers) == 1, "the same time needs no new timer"
    await loop.answer(100.125)
    assert loop.waits == [0.125]
    await loop.answer(None)
    assert loop.waits == []


async def test_a_time_in_the_past_is_no_endless_loop(loop: Loop) -> None:
    await loop.answer(99.0)
    assert loop.waits == [LEAST_WAIT_S]


async def test_the_same_time_after_it_came_is_set_again(loop: Loop) -> None:
    await loop.answer(100.25)
    loop.answers.append(100.25)
    loop.timers[0].ring()
    await loop.settle()
    assert len(loop.timers) == 2
