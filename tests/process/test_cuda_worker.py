"""GPU workers as real processes on a machine without a GPU: the runtime edge is fake.

The judge is a CPU worker with the same weights, in float32: every request must get its tokens,
whatever its way through one or several GPU workers.
"""

import itertools
import json
import os
import signal
import sys
from array import array
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from nodeserve.checkpoint import resolve
from nodeserve.config import WorkerSpec
from nodeserve.model import backend, families, kv
from nodeserve.model.loader import open_weights
from nodeserve.policy.batching import Limits, Sequence
from nodeserve.policy.scheduler import Scheduler
from nodeserve.types import Sampling, sampling_to
from nodeserve.wire.messages import (
    Cancel,
    Dropped,
    FromWorker,
    KvPulled,
    PagesAttached,
    Prefill,
    Prompt,
    ReleaseKv,
    RequestFailed,
    Shutdown,
    pack_ids,
)
from nodeserve.worker.executor import ModelExecutor
from nodeserve.worker.inputs import Staging
from tests.fakes.cuda import load_fake_cuda
from tests.fakes.cuda_worker import PLAIN_PARTS
from tests.fakes.harness import WorkerProcess, default_spec, started
from tests.patience import PATIENCE_S
from tests.process.conftest import Connect, Nodes
from tests.process.test_lost_workers import all_ready
from tests.repeats import repeats

pytestmark = pytest.mark.slow
GPU_WORKER = (sys.executable, "-m", "tests.fakes.cuda_worker")
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
CONTEXT = 64
FREE = [0, 0, 0, 24, 0]  # a load: nothing held, all blocks free
PROMPTS = {1: [7 * i % 191 for i in range(25)], 2: [3, 1, 4], 3: [5 * i % 97 for i in range(8)]}
SAMPLING: dict[int, dict[str, Any]] = {
    1: {"max_tokens": 10},
    2: {"max_tokens": 6, "temperature": 0.9, "seed": 5, "top_p": 0.9},
    3: {"max_tokens": 5, "temperature": 1.0, "seed": 6, "top_k": 40, "repetition_penalty": 1.2},
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
        "attention_backend": "reference",  # interpreted kernels take seconds; they have own tests
        "max_model_len": CONTEXT,
        "max_num_seqs": 6,
        "max_num_batched_tokens": 20,
        "kv_memory": 24 * BLOCK_BYTES,
    }
    return default_spec(**{**values, **changes})


@pytest.fixture(scope="module")
def expected(model: str) -> dict[int, list[int]]:
    """Every request's tokens by the CPU device, each request alone."""
    found = resolve(model, "dummy")
    ops = backend.make_ops(found.config, torch.float32)
    weights = open_weights(found, torch.float32, "dummy")
    layout = kv.layout_of(found.config, 16, torch.float32)
    cache = ops.cache(layout, bytearray(24 * layout.block_bytes))
    judge = ModelExecutor(
        families.build(found.config, weights, ops), cache, Staging(CONTEXT, 4, CONTEXT // 16)
    )
    streams = {}
    for request_id, prompt in PROMPTS.items():
        scheduler = Scheduler(Limits(24, 16, CONTEXT, 4, CONTEXT))
        sampling = Sampling(**{"temperature": 0.0, **SAMPLING[request_id]})
        sequence = Sequence(request_id, array("i", prompt), len(prompt), sampling)
        scheduler.submit(sequence)
        while (batch := scheduler.next_batch()) is not None:
            scheduler.commit(batch, judge.launch(batch).result().token_ids)
        streams[request_id] = sequence.token_ids[len(prompt) :].tolist()
    return streams


def finish(worker: WorkerProcess, requests: dict[int, list[int]]) -> dict[int, list[int]]:
    """The streams of these requests, run to their ends as a coordinator would: what is preempted
    comes back with what it has."""
    streams: dict[int, list[int]] = {one: [] for one in requests}
    names = {one: one for one in requests}  # the worker's name of a request
    for one, prompt in requests.items():
        worker.prefill(one, prompt, **SAMPLING[one])
    while names:
        worker.until(lambda: any(n in worker.finished or n in worker.preempted for n in names))
        for name, one in list(names.items()):
            if name not in worker.finished and name not in worker.preempted:
                continue
            streams[one] += worker.streams.pop(name, [])
            del names[name]
            if name in worker.finished:
                continue
            names[name + 100] = one
            again = sampling_to(Sampling(**{"temperature": 0.0, **SAMPLING[one]}))
            tokens = pack_ids([*requests[one], *streams[one]])
            worker.send(Prefill(0, [Prompt(name + 100, tokens, len(requests[one]), again, False)]))
    return streams


def test_a_mixed_worker_gives_the_tokens_of_the_cpu(
    model: str, expected: dict[int, list[int]]
) -> None:
    """Chunked prompts among decodes, drawn tokens among greedy ones, a pool for about half of
    them, and a request that is cancelled in the middle."""
    with started(spec_of(model, kv_memory=5 * BLOCK_BYTES), command=GPU_WORKER) as [worker]:
        assert worker.ready.kernels.endswith("CUDA graphs to 6")
        worker.prefill(9, PROMPTS[1], max_tokens=10)
        assert finish(worker, PROMPTS) == expected
        assert worker.preempted == [1], "the pool has room for one of the long ones"
        worker.finish(9)
        assert worker.streams[9] == expected[1]
        worker.prefill(8, PROMPTS[2], max_tokens=50)
        worker.until(lambda: len(worker.streams.get(8, [])) > 2)
        worker.send(Cancel(8))
        worker.expect(Dropped, 8)
        worker.until(
            lambda: worker.load[:5] == [0, 0, 0, 5, 0]
        )  # once no launched step writes there
        worker.send(Shutdown())
        assert worker.process.wait(PATIENCE_S) == 0


@pytest.fixture(scope="module")
def four(model: str) -> Iterator[list[WorkerProcess]]:
    """2p2d: every GPU reads GPU 0, and nobody GPU 1, so its worker goes through host memory."""
    specs = [
        spec_of(model, index=0, role="prefill", gpus=(0, 1, 2, 3)),
        spec_of(model, index=1, role="prefill", gpus=(1, 0, 2, 3)),
        spec_of(model, index=2, role="decode", gpus=(2, 0, 1, 3)),
        spec_of(model, index=3, role="decode", gpus=(3, 0, 1, 2), enforce_eager=True),
    ]
    environment = {
        "NODESERVE_FAKE_CUDA_DEVICES": "4",
        "NODESERVE_FAKE_CUDA_PEERS": "0-1,0-2,0-3,2-3",
        PLAIN_PARTS: "1",
    }
    with started(*specs, command=GPU_WORKER, environment=environment) as workers:
        for target in workers[2:]:
            for source in workers[:2]:
                target.attach(source)
                assert target.expect(PagesAttached).worker == source.spec.index
        yield workers


def until_pinned(worker: WorkerProcess, request_id: int) -> None:
    worker.until(lambda: request_id in worker.pinned)


def until_empty(worker: WorkerProcess) -> None:
    worker.until(lambda: worker.load[:5] == FREE)


def until_ended(worker: WorkerProcess, request_id: int) -> None:
    """Until a pull ended, one way or the other."""
    worker.until(lambda: any(_ended(one, request_id) for one in worker.said))


def test_each_prefill_worker_has_its_own_way_out(four: list[WorkerProcess]) -> None:
    assert four[0].ready.handoff == "CUDA IPC"
    assert four[1].ready.handoff == "pinned host memory: GPUs 2, 3 cannot read GPU 1"
    assert four[2].ready.kernels.endswith("CUDA graphs to 6")
    assert four[3].ready.kernels.endswith("no CUDA graphs")


def test_moved_requests_continue_their_streams(
    four: list[WorkerProcess], expected: dict[int, list[int]]
) -> None:
    """From each prefill worker to each decode worker, several pulls at once."""
    for place, (source, _target) in enumerate(itertools.product(four[:2], four[2:])):
        for request_id, prompt in PROMPTS.items():
            name = 10 * place + request_id
            source.prefill(name, prompt, handoff=True, **SAMPLING[request_id])
    for place, (source, target) in enumerate(itertools.product(four[:2], four[2:])):
        for request_id, prompt in PROMPTS.items():
            name = 10 * place + request_id
            until_pinned(source, name)
            target.pull(source, name, prompt, **SAMPLING[request_id])
    for place, (source, target) in enumerate(itertools.product(four[:2], four[2:])):
        for request_id, prompt in PROMPTS.items():
            name = 10 * place + request_id
            pulled = target.expect(KvPulled, name)
            assert pulled.num_bytes == -(-len(prompt) // 16) * BLOCK_BYTES
            source.send(ReleaseKv(name))
            source.expect(Dropped, name)
            target.finish(name)
            assert source.streams[name] + target.streams[name] == expected[request_id]
    assert [worker.load[:5] for worker in four] == [FREE] * 4


def test_cancels_on_both_sides_leave_nothing(
    four: list[WorkerProcess], expected: dict[int, list[int]]
) -> None:
    """Right behind the pull, while it may be under way; and of offers that nobody pulled."""
    for source, target in itertools.product(four[:2], four[2:]):
        for name in (51, 52):
            source.prefill(name, PROMPTS[1], handoff=True, max_tokens=8)
            until_pinned(source, name)
        target.pull(source, 51, PROMPTS[1], max_tokens=8)
        target.send(Cancel(51))
        target.expect(Dropped, 51)
        until_empty(target)  # a step may still write there
        source.send(Cancel(51))
        source.send(Cancel(52))
        source.expect(Dropped, 51)
        assert source.expect(Dropped, 52).load[:5] == FREE
        for worker in (source, target):
            for name in (51, 52):
                worker.pinned.pop(name, None)
                worker.streams.pop(name, None)


def test_a_killed_peer_costs_only_its_own_requests(
    four: list[WorkerProcess], expected: dict[int, list[int]]
) -> None:
    """Last: it kills. Pages of a dead worker stay readable where they are open, or the pull fails;
    the puller goes on in any case."""
    target = four[2]
    for name, source in ((61, four[0]), (62, four[1])):
        source.prefill(name, PROMPTS[1], handoff=True, **SAMPLING[1])
        until_pinned(source, name)
        source.process.kill()
        source.process.wait()
        target.pull(source, name, PROMPTS[1], **SAMPLING[1])
        until_ended(target, name)
        if any(isinstance(one, KvPulled) for one in target.said if _ended(one, name)):
            target.finish(name)
            assert source.streams[name] + target.streams[name] == expected[1]
        target.prefill(name + 10, PROMPTS[2], **SAMPLING[2])
        target.finish(name + 10)
        assert target.streams[name + 10] == expected[2]
    assert target.load[:5] == FREE


def _ended(message: FromWorker, request_id: int) -> bool:
    """Whether a pull ended, one way or the other."""
    return isinstance(message, KvPulled | RequestFailed) and message.request_id == request_id


async def test_a_node_of_gpu_workers_serves_clients(
    model: str,
    expected: dict[int, list[int]],
    nodes: Nodes,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """1p1d on one GPU: the server places, starts and attaches its workers, and streams; also when
    the one that prefills ends meanwhile, and when it is back."""
    monkeypatch.setenv(PLAIN_PARTS, "1")
    monkeypatch.setenv("NODESERVE_FAKE_CUDA_DEVICES", "4")
    node = nodes.start(
        gpu_model=model,
        load_format="dummy",
        layout="1p1d",
        gpus="2,2",
        dtype="float32",
        attention_backend="reference",
        max_model_len=CONTEXT,
        max_num_seqs=4,
        max_num_batched_tokens=20,
        kv_memory=24 * BLOCK_BYTES,
        restart_delay=0.0,
    )
    client = await connect(node)
    for request_id, prompt in PROMPTS.items():
        client.submit(request_id, prompt, **SAMPLING[request_id])
    await client.finish(*PROMPTS)
    assert client.tokens == expected
    workers = (await client.stats())["workers"]
    assert [worker["handoff"] for worker in workers] == ["CUDA IPC", "pulls only"]
    for to_kill in ([workers[0]["pid"]], []):
        client = await connect(node)
        for request_id, prompt in PROMPTS.items():
            client.submit(request_id, prompt, **SAMPLING[request_id])
        for pid in to_kill:
            os.kill(pid, signal.SIGKILL)
        await client.finish(*PROMPTS)
        assert client.tokens == expected
        assert (await all_ready(client))["workers"][0]["restarts"] == 1
    moved = {one: ends[0].timings["handoff_bytes"] for one, ends in client.ends.items()}
    assert any(moved.values()), "it is back, and its pages are read where they are now"


@pytest.mark.repeats
@pytest.mark.parametrize(
    ("layout", "handoff"),
    [
        *repeats([], [("1m:tp2", "auto")]),
        ("1m:tp2.pp2", "auto"),
        ("1p:pp2,1d:tp2", "auto"),
        ("1p:tp2,1d:pp2", "host"),
    ],
)
async def test_teams_of_gpus_give_the_same_tokens(
    nodes: Nodes,
    connect: Connect,
    model: str,
    expected: dict[int, list[int]],
    monkeypatch: pytest.MonkeyPatch,
    layout: str,
    handoff: str,
) -> None:
    """Steps overlap, and decodes replay what was captured: a follower's inputs come from the
    tokens that its leader chose and nobody on the host has read."""
    monkeypatch.setenv(PLAIN_PARTS, "1")
    monkeypatch.setenv("NODESERVE_FAKE_CUDA_DEVICES", "4")
    node = nodes.start(
        gpu_model=model,
        load_format="dummy",
        layout=layout,
        handoff=handoff,
        dtype="float32",
        max_model_len=CONTEXT,
        max_num_seqs=4,
        max_num_batched_tokens=20,
        kv_memory=24 * BLOCK_BYTES,
    )
    client = await connect(node)
    for request_id, prompt in PROMPTS.items():
        client.submit(request_id, prompt, **SAMPLING[request_id])
    await client.finish(*PROMPTS)
    assert client.tokens == expected
    moved = [ends[0].timings["handoff_bytes"] for ends in client.ends.values()]
    assert any(moved) == ("p:" in layout)
