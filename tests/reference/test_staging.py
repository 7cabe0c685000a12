"""From a batch to what the forward pass reads: the ints say what the tensors hold."""

from array import array

import pytest
import torch

from nodeserve.model.inputs import StepInputs
from nodeserve.policy.batching import Batch, Sequence, Work
from nodeserve.types import Sampling
from nodeserve.worker.inputs import Staging

DECODES = [(9, 8, 1), (40, 39, 1)]  # tokens, first of this step, tokens in this step
CHUNKS = [(30, 0, 17), (70, 64, 6), (5, 4, 1)]
BATCHES = {"decodes": (DECODES, []), "chunks": ([], CHUNKS), "both": (DECODES, CHUNKS)}


def _built(decodes: list[tuple[int, int, int]], chunks: list[tuple[int, int, int]]) -> StepInputs:
    work = []
    for number, (length, start, count) in enumerate([*decodes, *chunks]):
        token_ids = array("i", range(100 * number, 100 * number + length))
        sequence = Sequence(number, token_ids, length, Sampling())
        sequence.block_ids.extend(range(10 * number, 10 * number + -(-(start + count) // 16)))
        work.append(Work(sequence, start, count, start + count == length))
    return Staging(64, 8, 8).build(Batch(work, len(decodes), sum(n for _, _, n in chunks)))


@pytest.mark.parametrize("kind", BATCHES)
def test_the_ints_are_what_the_tensors_say(kind: str) -> None:
    inputs = _built(*BATCHES[kind])
    counts = inputs.query_starts.diff()
    assert inputs.num_decodes == len(BATCHES[kind][0])
    assert (counts[: inputs.num_decodes] == 1).all()
    assert inputs.max_query_len == int(counts.max())
    assert inputs.max_context_len == int(inputs.context_lens.max())


def test_moving_keeps_everything_and_moves_every_tensor() -> None:
    inputs = _built(*BATCHES["both"])
    assert inputs.to(torch.device("cpu")) is inputs
    moved = inputs.to(torch.device("meta"))
    for name in StepInputs.__dataclass_fields__:
        before, after = getattr(inputs, name), getattr(moved, name)
        if isinstance(before, torch.Tensor):
            assert after.is_meta and after.shape == before.shape
        else:
            assert after == before
