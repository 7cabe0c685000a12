"""Worker processes with real rings, scheduler, pages and handoff; only the model is fake."""

import os
import signal
import subprocess
import sys

import pytest

from nodeserve.wire.messages import (
    Cancel,
    Dropped,
    Failed,
    KvPulled,
    KvRefused,
    PagesAttached,
    PullKv,
    ReleaseKv,
    RequestFailed,
    Shutdown,
    StepDone,
    pack_ids,
)
from tests.fakes.harness import default_spec, hand_over, started
from tests.fakes.model import FakeSettings, expected_stream
from tests.patience import PATIENCE_S

PROMPT = [7 * i % 91 + 1 for i in range(70)]
IDLE_LOAD = [0, 0, 0, 64, 0]


def test_a_mixed_worker_streams_and_ends_cleanly() -> None:
    with started(default_spec()) as [worker]:
        assert worker.ready.num_blocks == 64
        worker.prefill(1, PROMPT, max_tokens=20)
        worker.prefill(2, PROMPT[:3], max_tokens=1)
        worker.finish(1, 2)
        assert worker.streams == {1: expected_stream(PROMPT, 20), 2: expected_stream(PROMPT[:3], 1)}
        assert worker.finished == {1: 2, 2: 2}
        assert worker.load[:5] == IDLE_LOAD
        worker.send(Shutdown())
        assert worker.process.wait(PATIENCE_S) == 0


def test_a_request_moved_between_processes_continues_the_same_stream() -> None:
    with started(default_spec(), default_spec(index=1)) as [source, target]:
        target.attach(source)
        assert target.expect(PagesAttached).worker == 0
        for request_id in range(1, 6):
            prompt = PROMPT[: 13 * request_id]
            pulled = hand_over(source, target, request_id, prompt, max_tokens=40)
            assert pulled.num_bytes == -(-len(prompt) // 16) * source.ready.block_bytes
            assert source.expect(Dropped, request_id).load[:5] == IDLE_LOAD
        target.finish(*range(1, 6))
        for request_id in range(1, 6):
            expected = expected_stream(PROMPT[: 13 * request_id], 40)
            assert source.streams[request_id] + target.streams[request_id] == expected
        assert target.load[:5] == IDLE_LOAD


def test_a_damaged_record_ends_the_worker_that_meets_it() -> None:
    """It says so through the other ring, and the coordinator hears of it."""
    with started(default_spec()) as [worker]:
        worker.prefill(1, PROMPT, max_tokens=5)
        worker.finish(1)
        ring = worker.channel.inbox._ring
        assert ring.put(b"bytes without a seal")
        worker.send(Shutdown())
        failed = worker.expect(Failed)
        assert failed.code == "ring" and "damaged or out of order" in failed.message
        assert worker.process.wait(PATIENCE_S) == 1


def test_preempted_requests_are_said_and_continue_from_their_tokens() -> None:
    """Three requests of 11 blocks in a pool of 24: the youngest gives way, then comes back."""
    with started(default_spec(kv_memory=24 * 128)) as [worker]:
        streams: dict[int, list[int]] = {}
        for request_id in (1, 2, 3):
            worker.prefill(request_id, PROMPT, max_tokens=100)
        worker.until(lambda: bool(worker.preempted))
        victim = worker.preempted[0]
        assert victim == 3
        streams[victim] = worker.streams.pop(victim)
        worker.finish(1, 2)
        worker.prefill(4, [*PROMPT, *streams[victim]], max_tokens=100 - len(streams[victim]))
        worker.finish(4)
        expected = expected_stream(PROMPT, 100)
        assert worker.streams[1] == worker.streams[2] == expected
        assert streams[victim] + worker.streams[4] == expected


@pytest.mark.parametrize("phase", ["unknown", "waiting", "running", "pinned"])
def test_a_cancel_frees_everything_in_every_phase(phase: str) -> None:
    with started(default_spec(max_model_len=1024, model=FakeSettings(step_s=0.01).name)) as [
        worker
    ]:
        if phase == "waiting":  # half of its chunks are computed
            worker.prefill(1, PROMPT * 8, max_tokens=200)
            worker.expect(StepDone)
        elif phase == "running":
            worker.prefill(1, PROMPT, max_tokens=200)
            worker.until(lambda: len(worker.streams.get(1, [])) > 2)
        elif phase == "pinned":
            worker.prefill(1, PROMPT, handoff=True, max_tokens=200)
            worker.until(lambda: 1 in worker.pinned)
        worker.send(Cancel(1))
        assert worker.expect(Dropped, 1).load[:5] == IDLE_LOAD
        worker.prefill(2, PROMPT, max_tokens=5)
        worker.finish(2)
        assert worker.streams[2] == expected_stream(PROMPT, 5)


def test_a_cancel_right_behind_a_pull_leaves_nothing() -> None:
    with started(default_spec(), default_spec(index=1)) as [source, target]:
        target.attach(source)
        source.prefill(1, PROMPT, handoff=True, max_tokens=50)
        source.until(lambda: 1 in source.pinned)
        target.pull(source, 1, PROMPT, max_tokens=50)
        target.send(Cancel(1))
        assert target.expect(Dropped, 1).load[:5] == IDLE_LOAD
        source.send(ReleaseKv(1))
        assert source.expect(Dropped, 1).load[:5] == IDLE_LOAD


def test_a_pull_without_room_is_refused_and_works_later() -> None:
    # Slow steps: the first three must still run when the fourth pull arrives.
    slow = FakeSettings(step_s=0.1).name
    small = default_spec(index=1, kv_memory=16 * 128, model=slow)
    with started(default_spec(), small) as [source, target]:
        target.attach(source)
        for request_id in range(4):
            source.prefill(request_id, PROMPT, handoff=True, max_tokens=9)
        source.until(lambda: len(source.pinned) == 4)
        for request_id in range(4):
            target.pull(source, request_id, PROMPT, max_tokens=9)
        assert target.expect(KvRefused).request_id == 3
        target.finish(0, 1, 2)
        target.pull(source, 3, PROMPT, max_tokens=9)
        target.finish(3)
        for request_id in range(4):
            stream = source.streams[request_id] + target.streams[request_id]
            assert stream == expected_stream(PROMPT, 9)


def test_a_pull_from_nowhere_fails_alone() -> None:
    with started(default_spec(), default_spec(index=1)) as [source, target]:
        ids = [*PROMPT, 5]
        pull = PullKv(1, 0, pack_ids(range(5)), pack_ids(ids), len(PROMPT), {})
        target.send(pull)
        assert target.expect(RequestFailed, 1).code == "handoff_failed"
        target.attach(source)
        target.send(pull._replace(block_ids=pack_ids([0, 1, 2, 3, 64])))
        assert target.expect(RequestFailed, 1).code == "handoff_failed"
        target.prefill(2, PROMPT, max_tokens=3)
        target.finish(2)
        assert target.load[:5] == IDLE_LOAD


def test_a_request_that_can_never_fit_fails_alone() -> None:
    with started(default_spec()) as [worker]:
        worker.prefill(1, [1] * 256, max_tokens=3)
        assert worker.expect(RequestFailed, 1).code == "prompt_too_long"
        worker.prefill(2, PROMPT, max_tokens=3)
        worker.finish(2)


def test_a_full_ring_slows_the_worker_and_loses_nothing() -> None:
    """The coordinator reads nothing until far more was said than the ring holds."""
    with started(default_spec(max_num_seqs=4), ring_bytes=4096) as [worker]:
        for request_id in range(4):
            worker.prefill(request_id, PROMPT[: 5 + request_id], max_tokens=200)
        worker.finish(*range(4))
        for request_id in range(4):
            assert worker.streams[request_id] == expected_stream(PROMPT[: 5 + request_id], 200)


def test_a_killed_worker_leaves_its_peer_and_its_pages_alone() -> None:
    dying = FakeSettings(crash_at_step=2, only_worker=0).name
    with started(default_spec(model=dying), default_spec(index=1)) as [source, target]:
        target.attach(source)
        source.prefill(1, PROMPT, handoff=True, max_tokens=30)
        assert source.process.wait(PATIENCE_S) == -signal.SIGKILL
        target.prefill(2, PROMPT, max_tokens=5)
        target.finish(2)
        assert target.streams[2] == expected_stream(PROMPT, 5)


def test_the_pages_of_a_dead_source_can_still_be_pulled() -> None:
    with started(default_spec(), default_spec(index=1)) as [source, target]:
        target.attach(source)
        source.prefill(1, PROMPT, handoff=True, max_tokens=30)
        source.until(lambda: 1 in source.pinned)
        source.process.kill()
        source.process.wait(PATIENCE_S)
        target.pull(source, 1, PROMPT, max_tokens=30)
        target.expect(KvPulled, 1)
        target.finish(1)
        assert source.streams[1] + target.streams[1] == expected_stream(PROMPT, 30)


def test_an_unexpected_error_is_said_before_the_exit() -> None:
    with started(default_spec(model=FakeSettings(fail_at_step=1).name)) as [worker]:
        worker.prefill(1, PROMPT, max_tokens=30)
        failed = worker.expect(Failed)
        assert failed.code == "internal" and "told to fail" in failed.message
        assert worker.process.wait(PATIENCE_S) == 1


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"model": FakeSettings(load_error="no such model").name}, "bad_model", "no such model"),
        ({"kv_memory": 100}, "bad_config", "--kv-memory"),
        ({"max_num_batched_tokens": 4}, "bad_config", "max-num-seqs"),
        ({"cpus": (4095,)}, "bad_config", "4095"),
    ],
)
def test_a_start_that_cannot_work_says_why(
    changes: dict[str, object], code: str, words: str
) -> None:
    with started(default_spec(**changes), wait_ready=False) as [worker]:
        failed = worker.expect(Failed)
        assert failed.code == code and words in failed.message
        assert worker.process.wait(PATIENCE_S) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_left_to_the_coordinator(number: signal.Signals) -> None:
    with started(default_spec()) as [worker]:
        worker.process.send_signal(number)
        worker.prefill(1, PROMPT, max_tokens=3)
        worker.finish(1)
        assert worker.process.poll() is None


ORPHAN = """
import os, signal, sys
from tests.fakes.harness import default_spec, started
with started(default_spec(), pass_fds=(int(sys.argv[1]),)) as [worker]:
    os.kill(os.getpid(), signal.SIGKILL)
"""


LOSES_A_THREAD = """
import threading
from nodeserve.worker.process import end_with_any_thread
end_with_any_thread()
threading.Thread(target=lambda: 1 // 0).start()
threading.Event().wait()  # deaf from here on
"""


def test_a_worker_ends_with_any_of_its_threads() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", LOSES_A_THREAD], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert ended.returncode == 1 and "ZeroDivisionError" in ended.stderr


def test_a_worker_dies_with_its_parent() -> None:
    """A pipe that only the worker still holds open for writing shows its end."""
    reader, writer = os.pipe()
    parent = subprocess.Popen([sys.executable, "-c", ORPHAN, str(writer)], pass_fds=(writer,))
    os.close(writer)
    assert parent.wait(PATIENCE_S) == -signal.SIGKILL
    assert os.read(reader, 1) == b""
    os.close(reader)
