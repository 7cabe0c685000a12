"""How long workers wait for each other where they meet."""

import os
from dataclasses import fields
from typing import Any

import pytest
import torch

from nodeserve.config import WorkerSpec
from nodeserve.model.group import Groups
from nodeserve.worker import meeting


def test_nobody_gives_up_on_a_member_that_loads_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator knows who is late. A store of torch's own gives up after five minutes, which
    a cold disk may take."""
    descriptor = os.memfd_create("rendezvous")
    values: dict[str, Any] = dict.fromkeys(field.name for field in fields(WorkerSpec))
    values |= {"tp": 2, "pp": 1, "ep": 1, "rank": 0, "rendezvous_fd": descriptor}
    values |= {"max_num_batched_tokens": 512, "max_num_seqs": 16}
    waits_s: list[float] = []

    def connect(place: object, store: Any, *rest: object) -> Groups:
        waits_s.append(store.timeout.total_seconds())
        return Groups.alone()

    monkeypatch.setattr(meeting, "connect", connect)
    try:
        met = meeting.meet(WorkerSpec(**values), torch.device("cpu"), 64)
        waits_s.append(met.store.timeout.total_seconds())
    finally:
        os.close(descriptor)
    assert waits_s == [meeting.SILENCE_S] * 2
