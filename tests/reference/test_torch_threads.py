"""Threads that take torch's small products side by side."""

import threading

import pytest
import torch

from nodeserve.model.torch_threads import TorchThreads


def test_jobs_run_side_by_side() -> None:
    """Each waits for the other, so one thread would never get on; the time ends a broken test."""
    meeting = threading.Barrier(2)
    for num_jobs in (2, 4):
        TorchThreads(2).run([lambda: meeting.wait(20.0) and None] * num_jobs)


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("num_jobs", [0, 1, 7])
def test_every_job_runs_once(num_threads: int, num_jobs: int) -> None:
    """Also where what they write belongs to torch's inference mode."""
    with torch.inference_mode():
        out = torch.zeros(num_jobs)

        def job(place: int) -> None:
            out[place] += place + 1

        TorchThreads(num_threads).run([lambda p=p: job(p) for p in range(num_jobs)])  # type: ignore[misc]
    assert out.tolist() == list(range(1, num_jobs + 1))


def test_what_a_job_raises_is_raised_when_all_have_ended() -> None:
    ended = []

    def fails() -> None:
        raise ValueError("no such block")

    with pytest.raises(ValueError, match="no such block"):
        TorchThreads(2).run([fails, lambda: ended.append(1), lambda: ended.append(2)])
    assert ended == [1, 2]
