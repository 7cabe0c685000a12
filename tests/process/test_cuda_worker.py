"""GPU workers as real processes on a machine without a GPU: the runtime edge is fake.

The judge is a CPU worker with the same weights, in float32: every request must get its tokens,
whatever its way through one or several GPU workers.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nodeserve.config import WorkerSpec
from nodeserve.wire.messages import (
    Cancel,
    Dropped,
    Failed,
    KvPulled,
    PagesAttached,
    PullKv,
    ReleaseKv,
    RequestFailed,
    Shutdown,
)
from tests.fakes.cuda import load_fake_cuda
from tests.fakes.harness import DEADLINE_S, WorkerProcess, default_spec, hand_over, started

GPU_WORKER = (sys.executable, "-m", "tests.fakes.cuda_worker")
CPU_WORKER = (sys.executable, "-m", "nodeserve.worker")
CONFIG = {
    "model_type": "llama",
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
BLOCK_BYTES = 2 * 2 * 1 * 16 * 16 * 4
CONTEXT = 96
PROMPTS = {1: [7 * i % 191 for i in range(41)], 2: [3, 1, 4], 3: [5 * i % 97 for i in range(16)]}
SAMPLING: dict[int, dict[str, Any]] = {
    1: {"max_tokens": 8},
    2: {"max_tokens": 9, "temperature": 0.9, "seed": 5, "top_p": 0.9},
    3: {"max_tokens": 6, "temperature": 1.0, "seed": 6, "top_k": 40, "repetition_penalty": 1.2},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    load_fake_cuda()  # compiled here once, not by each worker
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return str(folder)


def spec_of(model: str, **changes: Any) -> WorkerSpec:
    values: dict[str, Any] = {
        "model": model,
        "load_format": "dummy",
        "dtype": "float32",
        "device": "cuda",
        "gpus": (0,),
        "max_model_len": CONTEXT,
        "max_num_seqs": 4,
        "kv_memory": 24 * BLOCK_BYTES,
    }
    return default_spec(**{**values, **changes})


@pytest.fixture(scope="module")
def expected(model: str) -> dict[int, list[int]]:
    """Every request's tokens on the CPU."""
    with started(spec_of(model, device="cpu", gpus=()), command=CPU_WORKER) as [worker]:
        for request_id, prompt in PROMPTS.items():
            worker.prefill(request_id, prompt, **SAMPLING[request_id])
        worker.finish(*PROMPTS)
        return worker.streams


def test_a_mixed_worker_gives_the_tokens_of_the_cpu(
    model: str, expected: dict[int, list[int]]
) -> None:
    """Chunked prompts among decodes, drawn tokens among greedy ones, a cancel in between."""
    with started(spec_of(model), command=GPU_WORKER) as [worker]:
        assert worker.ready.kernels.endswith("CUDA graphs to 4")
        worker.prefill(9, PROMPTS[1], max_tokens=40)
        for request_id, prompt in PROMPTS.items():
            worker.prefill(request_id, prompt, **SAMPLING[request_id])
        worker.until(lambda: len(worker.streams.get(9, [])) > 2)
        worker.send(Cancel(9))
        worker.expect(Dropped, 9)
        worker.finish(*PROMPTS)
        assert {one: worker.streams[one] for one in PROMPTS} == expected
        assert worker.streams[9][:8] == expected[1][: len(worker.streams[9])]
        assert worker.load == [0, 0, 0, 24, 0]
        worker.send(Shutdown())
        assert worker.process.wait(DEADLINE_S) == 0


def test_a_preempted_request_continues_its_stream(
    model: str, expected: dict[int, list[int]]
) -> None:
    """Two requests of 4 blocks in the end, in a pool of 6, without graphs."""
    tight = spec_of(model, kv_memory=6 * BLOCK_BYTES, enforce_eager=True)
    with started(tight, command=GPU_WORKER) as [worker]:
        assert worker.ready.kernels.endswith("no CUDA graphs")
        for request_id in (1, 9):
            worker.prefill(request_id, PROMPTS[1], max_tokens=8)
        worker.until(lambda: bool(worker.preempted))
        assert worker.preempted == [9]
        emitted = worker.streams[9]
        worker.finish(1)
        worker.prefill(8, [*PROMPTS[1], *emitted], max_tokens=8 - len(emitted))
        worker.finish(8)
        assert worker.streams[1] == emitted + worker.streams[8] == expected[1]


@pytest.fixture(scope="module", params=["ipc", "host"])
def pair(request: pytest.FixtureRequest, model: str) -> Iterator[list[WorkerProcess]]:
    """Two prefill and two decode workers, each decode worker attached to both pools."""
    peers = "all" if request.param == "ipc" else "0-2"
    specs = [
        spec_of(model, index=0, role="prefill", gpus=(0, 1, 2, 3)),
        spec_of(model, index=1, role="prefill", gpus=(1, 0, 2, 3)),
        spec_of(model, index=2, role="decode", gpus=(2, 0, 1, 3)),
        spec_of(model, index=3, role="decode", gpus=(3, 0, 1, 2)),
    ]
    yield from _four(specs, request.param, peers)


def _four(specs: list[WorkerSpec], kind: str, peers: str) -> Iterator[list[WorkerProcess]]:
    environment = {"NODESERVE_FAKE_CUDA_DEVICES": "4", "NODESERVE_FAKE_CUDA_PEERS": peers}
    with started(*specs, command=GPU_WORKER, environment=environment) as workers:
        for worker in workers[:2]:
            said = worker.ready.handoff
            assert ("CUDA IPC" in said) == (kind == "ipc") and ("host" in said) == (kind == "host")
        for target in workers[2:]:
            for source in workers[:2]:
                target.attach(source)
                assert target.expect(PagesAttached).worker == source.spec.index
        yield workers
