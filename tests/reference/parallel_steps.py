"""Steps of several prompts on one worker or on the workers of an instance."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from nodeserve.checkpoint import Checkpoint
from nodeserve.config import ModelConfig
from nodeserve.model import kv, parallel
from nodeserve.model.backend import make_ops
from nodeserve.model.group import Groups
from nodeserve.model.inputs import StepInputs
from nodeserve.model.loader import open_stored
from nodeserve.shards import Place, Shard

BLOCK_SIZE = 16
MAX_BLOCKS = 8  # of a sequence
PROMPTS = ((61, 7), (7, 3), (90, 11))  # tokens, and a number that makes them others
CHUNKS = ({0: 33, 2: 1}, {2: 60}, {0: 28, 1: 7}, {2: 29})  # per step: prompt -> tokens of it
NUM_DECODES = 6


@dataclass(frozen=True)
class Case:
    """A model and how it is run."""

    checkpoint: Checkpoint
    dtype: torch.dtype
    tokens: list[list[int]]  # of each prompt, and behind it what is decoded
    chunks: tuple[dict[int, int], ...] = CHUNKS


def steps_of(case: Case) -> Iterator[tuple[StepInputs, list[int]]]:
    """Inputs of each step, and the prompts whose logits it gives; tokens behind a prompt's own are
    read when its step begins."""
    done = [0] * len(PROMPTS)
    decodes: tuple[dict[int, int], ...] = ({0: 1, 1: 1, 2: 1},) * NUM_DECODES
    for chunks in (*case.chunks, *decodes):
        order = sorted(chunks, key=lambda prompt: chunks[prompt] != 1 or done[prompt] == 0)
        spans = {p: (done[p], done[p] + chunks[p]) for p in order}
        for prompt, (_, end) in spans.items():
            done[prompt] = end
        wanted = [p for p in order if done[p] >= PROMPTS[p][0]]
        yield inputs_of(case.tokens, spans, wanted), wanted


def inputs_of(
    tokens: list[list[int]], spans: dict[int, tuple[int, int]], wanted: list[int]
) -> StepInputs:
    """One step of these prompts, from where to where in their tokens. Prompt p has the blocks from
    p * MAX_BLOCKS on."""

    def int32(values: Any) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.int32)

    counts = [end - first for first, end in spans.values()]
    last = {prompt: sum(counts[: i + 1]) - 1 for i, prompt in enumerate(spans)}
    return StepInputs(
        token_ids=int32(t for p, (a, b) in spans.items() for t in tokens[p][a:b]),
        positions=int32(at for a, b in spans.values() for at in range(a, b)),
        query_starts=int32([0, *counts]).cumsum(0, dtype=torch.int32),
        context_lens=int32(b for _, b in spans.values()),
        block_table=torch.stack(
            [int32(range(p * MAX_BLOCKS, (p + 1) * MAX_BLOCKS)) for p in spans]
        ),
        logit_rows=int32(last[prompt] for prompt in wanted),
        num_decodes=sum(a > 0 and b - a == 1 for a, b in spans.values()),
        max_query_len=max(counts),
        max_context_len=max(b for _, b in spans.values()),
    )


EMPTY = StepInputs(
    **{
        name: torch.zeros(0, dtype=torch.int32)
        for name in ("token_ids", "positions", "context_lens", "logit_rows")
    },
    query_starts=torch.zeros(1, dtype=torch.int32),
    block_table=torch.zeros(0, MAX_BLOCKS, dtype=torch.int32),
    num_decodes=0,
    max_query_len=0,
    max_context_len=0,
)


def prompts(config: ModelConfig) -> list[list[int]]:
    return [[(k * i * i + i) % config.vocab_size for i in range(n)] for n, k in PROMPTS]


def zeroed(block_bytes: int) -> torch.Tensor:
    """Room for all prompts."""
    return torch.zeros(len(PROMPTS) * MAX_BLOCKS * block_bytes, dtype=torch.uint8)


def run_model(
    place: Place,
    groups: Groups,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    make_pool: Callable[[int], Any] = zeroed,
) -> tuple[Any, Any, kv.KvLayout]:
    """The model's part, its pages, and what a block of them is. `make_pool`: memory of some such
    blocks, from the bytes of one."""
    shard = Shard(checkpoint.config, place)
    ops = make_ops(shard.config, dtype, block_size=BLOCK_SIZE)
    layout = kv.layout_of(checkpoint.config, BLOCK_SIZE, dtype, shard)
    model = parallel.build(shard, open_stored(checkpoint, dtype), ops, groups)
    return model, ops.cache(layout, make_pool(layout.block_bytes)), layout


def alone(case: Case) -> list[torch.Tensor]:
    """Logits of every step on one worker; `case.tokens` grows by the likeliest ones."""
    model, cache, _ = run_model(Place(), Groups.alone(), case.checkpoint, case.dtype)
    found = []
    for inputs, wanted in steps_of(case):
        logits = model.forward(inputs, cache).clone()
        found.append(logits)
        for prompt, row in zip(wanted, logits, strict=True):
            case.tokens[prompt].append(int(row.argmax()))
    return found


def together(place: Place, groups: Groups, cases: list[Case]) -> list[list[torch.Tensor]]:
    """The logits that this worker gives, of each case and step.

    Ranks that share experts have a step less than their neighbour behind them, so none is where
    another is, and the first and last ones have nothing to do at one of the ends.
    """
    found = []
    for case in cases:
        model, cache, _ = run_model(place, groups, case.checkpoint, case.dtype)
        steps = [inputs for inputs, _ in steps_of(case)]
        before, after = [EMPTY] * place.ep_rank, [EMPTY] * (place.ep - 1 - place.ep_rank)
        logits = _in_flight(model, cache, [*before, *steps, *after])
        found.append(logits[place.ep_rank :][: len(steps)])
    return found


def _in_flight(model: Any, cache: Any, steps: list[StepInputs]) -> list[torch.Tensor]:
    """Each step's logits are asked for when the next one is on its way."""
    found, waiting = [], []
    for inputs in steps:
        if model.stage.pipe is None:
            found.append(model.forward(inputs, cache).clone())
            continue
        model.advance(inputs, cache)
        waiting.append(inputs.logit_rows.numel())
        if len(waiting) > 1:
            found.append(model.logits(waiting.pop(0)).clone())
    return found + [model.logits(num_rows).clone() for num_rows in waiting]
