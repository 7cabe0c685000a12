"""Steps for a model by itself: whole prompts at once, or cut into any pieces."""

import torch

from nodeserve.config import ModelConfig
from nodeserve.model import families, kv
from nodeserve.model.inputs import StepInputs
from nodeserve.model.ops import Ops

BLOCK_SIZE = 16
NUM_BLOCKS = 40


def whole_prompts(prompts: list[list[int]], first_block: int = 0) -> StepInputs:
    """All tokens of all prompts in one step, logits for every row."""
    lens = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32)
    starts = torch.cat([torch.zeros(1, dtype=torch.int32), lens.cumsum(0, dtype=torch.int32)])
    width = -(-int(lens.max()) // BLOCK_SIZE)
    table = torch.full((len(prompts), width), -1, dtype=torch.int32)
    at = first_block
    for row, prompt in enumerate(prompts):
        count = -(-len(prompt) // BLOCK_SIZE)
        table[row, :count] = torch.arange(at + count - 1, at - 1, -1)  # not in pool order
        at += count
    return StepInputs(
        token_ids=torch.tensor(sum(prompts, []), dtype=torch.int32),
        positions=torch.cat([torch.arange(len(p), dtype=torch.int32) for p in prompts]),
        query_starts=starts,
        context_lens=lens,
        block_table=table,
        logit_rows=torch.arange(int(starts[-1]), dtype=torch.int32),
        num_decodes=0,
        max_query_len=int(lens.max()),
        max_context_len=int(lens.max()),
    )


Steps = list[dict[int, tuple[int, int]]]  # per step: prompt -> its tokens [first, last)
PROMPT_LENS = (61, 7, 130)


def in_steps(
    config: ModelConfig, ops: Ops, model: families.Model, steps: Steps
) -> list[torch.Tensor]:
    """Logits of every token of made prompts, run in `steps`."""
    layout = kv.layout_of(config, BLOCK_SIZE, ops.dtype)
    cache = ops.cache(layout, torch.zeros(NUM_BLOCKS * layout.block_bytes, dtype=torch.uint8))
    whole = whole_prompts([[(7 * i * i + n) % 211 for i in range(n)] for n in PROMPT_LENS])
    starts = whole.query_starts.tolist()
    logits = torch.zeros(starts[-1], config.vocab_size)
    for spans in steps:
        rows = torch.cat(
            [torch.arange(starts[p] + a, starts[p] + b) for p, (a, b) in spans.items()]
        )
        counts = torch.tensor([0, *(b - a for a, b in spans.values())], dtype=torch.int32)
        inputs = StepInputs(
            token_ids=whole.token_ids[rows],
            positions=whole.positions[rows],
            query_starts=counts.cumsum(0, dtype=torch.int32),
            context_lens=torch.tensor([b for _, b in spans.values()], dtype=torch.int32),
            block_table=whole.block_table[list(spans)],
            logit_rows=torch.arange(len(rows), dtype=torch.int32),
            num_decodes=0,
            max_query_len=max(b - a for a, b in spans.values()),
            max_context_len=max(b for _, b in spans.values()),
        )
        logits[rows] = model.forward(inputs, cache)
    return list(torch.split(logits, list(PROMPT_LENS)))
