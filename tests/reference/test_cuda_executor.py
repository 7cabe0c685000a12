"""The GPU worker's staging, executor and graphs on the fake runtime: late, and in any order."""

import itertools
import random
import threading
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nodeserve.checkpoint import Checkpoint
from nodeserve.config import ModelConfig
from nodeserve.errors import ModelError
from nodeserve.model.gpu.attention.tiles import seq_bucket
from nodeserve.model.group import Groups
from nodeserve.model.inputs import StepInputs
from nodeserve.model.loader import open_weights
from nodeserve.policy.batching import Batch, Sequence, Work
from nodeserve.shards import Place
from nodeserve.types import Sampling
from nodeserve.worker.contract import Sampled
from nodeserve.worker.executor_cuda import CudaExecutor, idle_prefills, warm_up_prompts
from nodeserve.worker.inputs import Staging
from nodeserve.worker.meeting import Meeting
from nodeserve.worker.staging_cuda import CudaStaging
from nodeserve.worker.upload import Uploader
from tests.fakes.gpu_runtime import FakeRuntime
from tests.patience import PATIENCE_S

TINY = ModelConfig("llama", 101, 8, 8, 1, 1, 1, 8, 128, 1e-5, 1e4)
VOCAB, BLOCK, CONTEXT = 101, 16, 128
MAX_TOKENS, MAX_SEQS, MAX_BLOCKS = 96, 6, CONTEXT // BLOCK
SPARE = 63
ALONE = Meeting(Place(), Groups.alone()).least  # what a team of one agrees on
TENSORS = (
    *("token_ids", "positions", "query_starts", "context_lens", "block_table", "logit_rows"),
)


@pytest.fixture
def runtime() -> FakeRuntime:
    return FakeRuntime()


def staging_of(runtime: FakeRuntime, num_steps: int = 2) -> CudaStaging:
    staging = CudaStaging(
        runtime,
        max_tokens=MAX_TOKENS,
        max_seqs=MAX_SEQS,
        max_context_len=CONTEXT,
        max_blocks=MAX_BLOCKS,
        num_steps=num_steps,
    )
    staging.spare_block = SPARE
    return staging


def sequence_of(num_tokens: int, seed: int = 0) -> Sequence:
    rng = random.Random(100 * seed + num_tokens)
    tokens = array("i", [rng.randrange(VOCAB) for _ in range(num_tokens)])
    sequence = Sequence(seed, tokens, num_tokens, Sampling(temperature=0.0))
    blocks = -(-num_tokens // BLOCK)
    sequence.block_ids.extend(rng.sample(range(60), blocks))
    return sequence


def decode(sequence: Sequence, feed: int | None = None) -> Work:
    start = len(sequence.token_ids) - (feed is None)
    return Work(sequence, start, 1, True, feed)


def random_batch(rng: random.Random) -> Batch:
    num_decodes = rng.randint(0, 4)
    batch = Batch([decode(sequence_of(rng.randint(1, 60), i)) for i in range(num_decodes)])
    batch.num_decodes = num_decodes
    for i in range(rng.randint(0 if num_decodes else 1, MAX_SEQS - num_decodes)):
        sequence = sequence_of(rng.randint(1, 40), 10 + i)
        start = rng.randint(0, len(sequence.token_ids) - 1)
        count = min(rng.randint(1, 15), len(sequence.token_ids) - start)
        whole = start + count == len(sequence.token_ids)
        batch.work.append(Work(sequence, start, count, whole))
    return batch


def test_one_copy_brings_what_the_cpu_reads(runtime: FakeRuntime) -> None:
    """For any batch, the device's views hold the same numbers as the CPU's staging."""
    ours, judge = staging_of(runtime), Staging(MAX_TOKENS, MAX_SEQS, MAX_BLOCKS)
    rng = random.Random(3)
    for _ in range(200):
        batch = random_batch(rng)
        staged, expected = ours.build(batch), judge.build(batch)
        ours.upload(staged)
        for name in TENSORS:
            assert torch.equal(getattr(staged.inputs, name), getattr(expected, name)), name
        assert staged.inputs.num_decodes == expected.num_decodes
        assert staged.inputs.max_query_len == expected.max_query_len
        assert staged.inputs.max_context_len == expected.max_context_len
        assert staged.feed is None


def test_a_captured_size_is_filled_up_with_harmless_rows(runtime: FakeRuntime) -> None:
    ours, judge = staging_of(runtime), Staging(MAX_TOKENS, MAX_SEQS, MAX_BLOCKS)
    for lengths in ((1,), (17, 3, 40), (128, 1, 16, 33, 8)):
        batch = Batch([decode(sequence_of(n, i)) for i, n in enumerate(lengths)])
        batch.num_decodes = count = len(lengths)
        for size in range(count, MAX_SEQS + 1):
            staged, expected = ours.build_decodes(batch, size), judge.build(batch)
            ours.upload(staged)
            inputs = staged.inputs
            assert inputs.num_decodes == size and inputs.max_context_len == CONTEXT
            assert torch.equal(inputs.token_ids[:count], expected.token_ids)
            assert torch.equal(inputs.positions[:count], expected.positions)
            assert torch.equal(inputs.context_lens[:count], expected.context_lens)
            assert inputs.query_starts.tolist() == list(range(size + 1))
            assert inputs.logit_rows.tolist() == list(range(size))
            width = expected.block_table.size(1)
            assert torch.equal(inputs.block_table[:count, :width], expected.block_table)
            assert inputs.positions[count:].tolist() == [0] * (size - count)
            assert inputs.context_lens[count:].tolist() == [1] * (size - count)
            assert inputs.block_table[count:, 0].tolist() == [SPARE] * (size - count)


def test_captured_inputs_have_the_same_addresses_each_time(runtime: FakeRuntime) -> None:
    staging = staging_of(runtime)
    before, feed_before = staging.decode_inputs(3)
    staged = staging.build_decodes(Batch([decode(sequence_of(5))], num_decodes=1), 3)
    for name in TENSORS:
        ours, theirs = getattr(staged.inputs, name), getattr(before, name)
        assert ours.data_ptr() == theirs.data_ptr() and ours.shape == theirs.shape, name
    assert staged.feed is not None and staged.feed.data_ptr() == feed_before.data_ptr()


@pytest.mark.parametrize("num_steps", [2, 3])
def test_steps_are_written_while_others_wait(runtime: FakeRuntime, num_steps: int) -> None:
    """So many are on their way at most: the next one finds its buffer read."""
    staging, seen, most = staging_of(runtime, num_steps), [], 0
    batches = [Batch([decode(sequence_of(n))], num_decodes=1) for n in (5, 9, 13, 21)]
    for batch in batches:
        staged = staging.build(batch)

        def read(staged: Any = staged) -> None:
            staging.upload(staged)
            seen.append(int(staged.inputs.token_ids[0]))

        staged.buffer.reader = runtime.submit(read)
        most = max(most, runtime.queue.num_given - runtime.queue.num_done)
    assert most == num_steps
    runtime.mark()
    assert seen == [batch.work[0].sequence.token_ids[-1] for batch in batches]


# -- the executor ---------------------------------------------------------------------------------


class Model:
    """Next token = (7 * token + 3 * position + block of the position) % VOCAB."""

    def __init__(self) -> None:
        self.memory = torch.zeros(MAX_TOKENS, VOCAB)
        self.num_calls = 0
        self.sizes: list[int] = []

    def advance(self, inputs: StepInputs, cache: Any) -> None:
        self.num_calls += 1
        self.sizes.append(inputs.token_ids.numel())
        rows = inputs.logit_rows.long()
        count = rows.numel()
        seqs = torch.searchsorted(inputs.query_starts, rows.int(), right=True) - 1
        position = inputs.positions[rows].long()
        block = inputs.block_table[seqs, position // BLOCK].long()
        best = (7 * inputs.token_ids[rows].long() + 3 * position + block) % VOCAB
        logits = self.memory[:count].zero_()
        logits[torch.arange(count), best] = 1.0

    def logits(self, num_rows: int) -> torch.Tensor:
        return self.memory[:num_rows]


def after(token: int, position: int, block: int) -> int:
    return (7 * token + 3 * position + block) % VOCAB


@dataclass
class Chosen:
    sampled: Sampled

    def result(self) -> Sampled:
        return self.sampled


@dataclass
class Argmax:
    tokens: torch.Tensor = field(default_factory=lambda: torch.zeros(MAX_SEQS, dtype=torch.int32))
    places: list[list[int]] = field(default_factory=list)

    def launch(self, logits: torch.Tensor, sequences: list[Sequence], places: list[int]) -> Chosen:
        assert len(logits) == len(sequences) == len(places)
        self.places.append(places)
        best = logits.argmax(-1).int()
        self.tokens[: len(best)] = best
        return Chosen(Sampled(best.tolist(), None))


def feed_tokens(token_ids: torch.Tensor, feed: torch.Tensor, sampled: torch.Tensor) -> None:
    fed = feed >= 0
    token_ids[fed] = sampled[feed[fed]]


def executor_of(runtime: FakeRuntime) -> tuple[CudaExecutor, Model, Argmax]:
    model, sampler = Model(), Argmax()
    executor = CudaExecutor(runtime, model, staging_of(runtime), sampler, feed_tokens)
    executor.use(None, SPARE)
    return executor, model, sampler


@pytest.mark.parametrize("sizes", [(), (1, 2, 4), (4,), (2,)], ids=str)
def test_steps_feed_each_other_on_the_device(runtime: FakeRuntime, sizes: tuple[int, ...]) -> None:
    """Ten steps, each launched before the one before was read: as if each had waited."""
    executor, model, sampler = executor_of(runtime)
    executor.capture(sizes, lambda done, total: None, ALONE)
    assert executor.graph_sizes == sizes
    sequences = [sequence_of(n, n) for n in (3, 30, 21)]
    for sequence in sequences:
        sequence.block_ids.extend([61, 62])  # room to grow into
    expected = [list(one.token_ids) for one in sequences]
    for tokens, one in zip(expected, sequences, strict=True):
        for _ in range(10):
            place = len(tokens) - 1
            tokens.append(after(tokens[-1], place, one.block_ids[place // BLOCK]))
    flights: list[Any] = []
    for step in range(10):
        order = sequences if step % 2 else sequences[::-1]  # rows change their places
        last = sequences[::-1] if step % 2 else sequences
        pending = bool(flights)
        batch = Batch(
            [
                Work(
                    one,
                    len(one.token_ids) - 1 + pending,
                    1,
                    True,
                    last.index(one) if pending else None,
                )
                for one in order
            ],
            num_decodes=3,
        )
        flights.append((executor.launch(batch), order))
        if len(flights) == 2:
            _read(*flights.pop(0))
    _read(*flights.pop(0))
    assert [list(one.token_ids) for one in sequences] == expected
    assert sampler.places == [[step] * 3 for step in range(10)]
    ran = model.sizes[2 * len(sizes) :]
    assert set(ran) == {4 if 4 in sizes else 3}


def _read(flight: Any, order: list[Sequence]) -> None:
    for one, token in zip(order, flight.result().token_ids, strict=True):
        one.token_ids.append(token)


def test_nothing_is_computed_before_somebody_waits(runtime: FakeRuntime) -> None:
    executor, model, _ = executor_of(runtime)
    flight = executor.launch(Batch([decode(sequence_of(5))], num_decodes=1))
    assert not flight.done() and model.num_calls == 0
    assert len(flight.result().token_ids) == 1 and flight.done()


def test_a_chunk_that_samples_nothing_has_no_tokens(runtime: FakeRuntime) -> None:
    executor, _, sampler = executor_of(runtime)
    flight = executor.launch(Batch([Work(sequence_of(20), 0, 12, False)], num_prefill_tokens=12))
    assert flight.result() == Sampled([], None) and not sampler.places


def test_blocks_that_come_later_do_not_change_a_launched_step(runtime: FakeRuntime) -> None:
    executor, _, _ = executor_of(runtime)
    sequence = sequence_of(5)
    flight = executor.launch(Batch([decode(sequence)], num_decodes=1))
    expected = after(sequence.token_ids[-1], 4, sequence.block_ids[0])
    sequence.block_ids[0] = 17
    assert flight.result().token_ids == [expected]


def test_a_size_that_cannot_be_captured_takes_another_road(
    caplog: pytest.LogCaptureFixture,
) -> None:
    runtime = FakeRuntime(fails_to_capture=lambda nth: nth == 1)  # the middle one: largest first
    executor, model, _ = executor_of(runtime)
    progress: list[tuple[int, int]] = []
    executor.capture((1, 2, 4), lambda done, total: progress.append((done, total)), ALONE)
    assert executor.graph_sizes == (1, 4)
    assert progress == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert "no graph for 2 sequences" in caplog.text and "not permitted" in caplog.text
    model.sizes.clear()
    two = Batch([decode(sequence_of(n, n)) for n in (5, 6)], num_decodes=2)
    executor.launch(two).result()
    five = Batch([decode(sequence_of(n, n)) for n in range(5, 10)], num_decodes=5)
    executor.launch(five).result()
    assert model.sizes == [4, 5]  # the larger graph, then none


def test_a_size_that_another_member_cannot_capture_is_nobodys(runtime: FakeRuntime) -> None:
    """A leader would replay it, and that follower has none."""
    executor, model, _ = executor_of(runtime)
    executor.capture((1, 2, 4), lambda done, total: None, lambda name, _: name != "graph of 2")
    assert executor.graph_sizes == (1, 4)
    model.sizes.clear()
    executor.launch(Batch([decode(sequence_of(n, n)) for n in (5, 6)], num_decodes=2)).result()
    assert model.sizes == [4]


def test_the_warm_up_runs_the_largest_steps_in_the_spare_block(runtime: FakeRuntime) -> None:
    executor, model, sampler = executor_of(runtime)
    executor.warm_up(MAX_TOKENS, MAX_SEQS, CONTEXT, BLOCK, VOCAB)
    assert model.sizes == [MAX_TOKENS, MAX_SEQS, MAX_SEQS, 1]
    model.sizes.clear()
    executor.warm_up(MAX_TOKENS, MAX_SEQS, 30, BLOCK, VOCAB)  # several prompts where one is short
    assert model.sizes[0] == MAX_TOKENS and len(sampler.places[4]) == 4
    prompts = [work.sequence.token_ids.tolist() for work in idle_prefills([3, 4], 0, BLOCK, 5).work]
    assert prompts == [[0, 1, 2], [3, 4, 0, 1]], "many words, for many experts"


@pytest.mark.parametrize(
    "sizes", [(8192, 256, 8191), (8192, 3000, 200), (64, 64, 63), (32, 8, 255)]
)
def test_the_warm_up_meets_every_number_of_prompts_that_has_its_own_kernel(
    sizes: tuple[int, int, int],
) -> None:
    max_tokens, max_seqs, longest = sizes
    steps = warm_up_prompts(*sizes)
    assert sum(steps[0]) == max_tokens
    for lengths in steps:
        assert 0 < len(lengths) <= max_seqs and sum(lengths) <= max_tokens
        assert min(lengths) > 0 and max(lengths) <= longest
    buckets = {seq_bucket(count) for count in range(1, max_seqs + 1)}
    assert {seq_bucket(len(lengths)) for lengths in steps if max(lengths) == 1} == buckets
    if max_tokens > max_seqs:
        assert {seq_bucket(len(lengths)) for lengths in steps if max(lengths) > 1} == buckets


def test_the_loop_is_woken_when_a_step_ended(runtime: FakeRuntime) -> None:
    executor, _, _ = executor_of(runtime)
    woken = threading.Semaphore(0)
    executor.on_done(woken.release)
    for sequence in (sequence_of(5), sequence_of(8)):
        flight = executor.launch(Batch([decode(sequence)], num_decodes=1))
        assert woken.acquire(timeout=PATIENCE_S)  # the watcher computed it: nobody else waited
        assert flight.done()


def test_work_that_fails_is_an_error_for_who_waits(runtime: FakeRuntime) -> None:
    executor, model, _ = executor_of(runtime)
    model.memory = torch.zeros(0, VOCAB)
    flight = executor.launch(Batch([decode(sequence_of(5))], num_decodes=1))
    with pytest.raises(RuntimeError, match="failed"):
        flight.result()


# -- uploads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
def test_tensors_arrive_whole_whatever_the_chunks(runtime: FakeRuntime, dtype: torch.dtype) -> None:
    for chunk, shape in itertools.product((8, 24, 4096), ((1,), (7, 3), (2, 0), (33,))):
        upload = Uploader(runtime, chunk_bytes=chunk)
        for _ in range(3):
            tensor = (torch.rand(shape) * 200).to(dtype)
            arrived = upload(tensor.t() if tensor.dim() == 2 else tensor)
            assert torch.equal(arrived.t() if tensor.dim() == 2 else arrived, tensor)
        upload.close()


def test_a_file_goes_to_the_device_in_its_own_type(runtime: FakeRuntime, tmp_path: Path) -> None:
    """float16 and float32 in the file, bfloat16 on the device: each rounded once."""
    tensors = {
        "a": torch.rand(7, 5),
        "b": torch.rand(40).half(),
        "c": torch.rand(3, 2).bfloat16(),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    found = Checkpoint(tmp_path, "safetensors", TINY, "tiny")
    upload = Uploader(runtime, chunk_bytes=64)
    weights = open_weights(found, torch.bfloat16, upload=upload)
    for name, tensor in tensors.items():
        assert name in weights
        arrived = weights(name)
        assert arrived.dtype is torch.bfloat16 and torch.equal(arrived, tensor.bfloat16())
    assert "d" not in weights
    with pytest.raises(ModelError, match="no tensor d"):
        weights("d")
