"""Who keeps gateways: one that cannot be started is tried again."""

import errno
import io
import os
import socket
import subprocess
import threading
from typing import Any

import pytest

from nodeserve.gateway import keeper
from nodeserve.gateway.keeper import Keeper
from tests.patience import PATIENCE_S


class Gateway:
    """A process that lives until it is told to end."""

    pid = 4_000_000

    def __init__(self) -> None:
        self.stdin = io.BytesIO()
        self._end = threading.Event()

    def wait(self) -> int:
        self._end.wait()
        return 0

    def terminate(self) -> None:
        self._end.set()


def test_one_that_cannot_be_started_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries: list[Any] = []
    started = threading.Event()

    def start(command: list[str], **options: Any) -> Gateway:
        tries.append(command)
        if len(tries) < 3:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        started.set()
        return Gateway()

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(keeper, "FIRST_DELAY_S", 0.001)
    with socket.socket() as listener:
        one = Keeper(0, listener, ["--socket=s"], None)
        one.start()
        started.wait()
        one.ask_to_end()
        one.wait(PATIENCE_S)
    assert len(tries) == 3
    lines = [record.getMessage() for record in caplog.records]
    assert [line.startswith("gateway 0 cannot be started") for line in lines] == [True, True]
