"""Messages through shared memory, with threads for processes: calls release the GIL."""

import mmap
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from nodeserve import _host

NUM_LINES = 6
TIMEOUT_S = 30.0


def ends(num_lines: int = NUM_LINES, timeout_s: float = TIMEOUT_S) -> tuple[_host.Pipe, _host.Pipe]:
    memory = mmap.mmap(-1, _host.pipe_bytes(64 * num_lines))
    return _host.Pipe(memory, timeout_s), _host.Pipe(memory, timeout_s)


def send(pipe: _host.Pipe, data: bytes) -> None:
    values = np.frombuffer(data, np.uint8)
    pipe.send(values.ctypes.data, len(data))


def receive(pipe: _host.Pipe, num_bytes: int) -> bytes:
    out = np.zeros(num_bytes + 1, np.uint8)
    pipe.receive(out.ctypes.data, num_bytes)
    assert not out[-1]
    return out[:-1].tobytes()


@pytest.mark.parametrize("num_lines", [2, 3, NUM_LINES, 100])
def test_messages_arrive_whole_and_in_order(num_lines: int) -> None:
    """Of a few bytes and of many times the room, by two ends that are late by turns."""
    chance = random.Random(num_lines)
    messages = [chance.randbytes(chance.choice([1, 63, 64, 65, 300, 5000])) for _ in range(300)]
    sender, receiver = ends(num_lines)

    def send_all() -> None:
        for number, message in enumerate(messages):
            for _ in range(2000 * (number % 3 == 0)):
                pass
            send(sender, message)

    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(send_all)
        for number, message in enumerate(messages):
            for _ in range(2000 * (number % 5 == 0)):
                pass
            assert receive(receiver, len(message)) == message
        sent.result()


def test_nobody_waits_to_send_while_there_is_room() -> None:
    """One thread has both ends: a line for a length, and the others for what it is of."""
    sender, receiver = ends(timeout_s=0.0)
    for number in range(10):
        first, second = bytes([number] * 64), bytes([100 + number] * 200)
        send(sender, first)
        send(sender, second[:150])
        assert receive(receiver, 64) == first and receive(receiver, 150) == second[:150]
        send(sender, second)
        assert receive(receiver, 200) == second


def test_who_waits_too_long_is_told_for_what() -> None:
    sender, receiver = ends(timeout_s=0.01)
    with pytest.raises(RuntimeError, match="the other end sends nothing"):
        receive(receiver, 1)
    with pytest.raises(RuntimeError, match="the other end takes nothing"):
        send(sender, bytes(64 * NUM_LINES))


def test_a_message_of_another_length_is_refused() -> None:
    sender, receiver = ends()
    send(sender, b"twelve bytes")
    with pytest.raises(ValueError, match="sends 12 bytes, expected are 16"):
        receive(receiver, 16)


def test_memory_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="room for two lines"):
        _host.Pipe(mmap.mmap(-1, _host.pipe_bytes(64)), TIMEOUT_S)
