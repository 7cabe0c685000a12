"""Runs a model step by step as a worker would: blocks, chunks of prompts, decodes side by side."""

from collections.abc import Sequence

import torch

from nodeserve.model.families import Model
from nodeserve.model.inputs import StepInputs
from nodeserve.model.kv import KvLayout
from nodeserve.model.ops import Ops

NUM_BLOCKS = 40

Span = tuple[int, int]  # a sequence's tokens from here to there


class Driver:
    """A model and its pages. Blocks of a sequence are scattered, and what is in them is old."""

    def __init__(self, model: Model, ops: Ops, layout: KvLayout) -> None:
        self._model = model
        self._block_size = layout.block_size
        pool = torch.zeros(NUM_BLOCKS * layout.block_bytes, dtype=torch.uint8, device=ops.device)
        self._cache = ops.cache(layout, pool)
        self._device = ops.device

    def whole(self, prompts: Sequence[list[int]]) -> list[torch.Tensor]:
        """Logits [tokens, vocab] of every token of each prompt, all in one step."""
        spans = [(0, len(prompt)) for prompt in prompts]
        logits = self.step(prompts, spans, list(range(sum(map(len, prompts)))))
        return list(torch.split(logits, [len(prompt) for prompt in prompts]))

    def greedy(self, prompts: Sequence[list[int]], count: int, chunk: int) -> list[list[int]]:
        """`count` tokens for each prompt; of the prompts, up to `chunk` tokens a step, one after
        the other, while those that are through decode."""
        tokens = [list(prompt) for prompt in prompts]
        done = [0] * len(prompts)  # tokens computed
        while any(len(own) < len(p) + count for own, p in zip(tokens, prompts, strict=True)):
            spans, room = [(0, 0)] * len(prompts), chunk
            for i, own in enumerate(tokens):
                if len(own) == len(prompts[i]) + count:
                    continue
                size = min(len(own) - done[i], room)
                spans[i] = (done[i], done[i] + size)
                room -= size if done[i] < len(prompts[i]) else 0
            self._advance(tokens, done, spans)
        return [own[len(p) :] for own, p in zip(tokens, prompts, strict=True)]

    def _advance(self, tokens: list[list[int]], done: list[int], spans: list[Span]) -> None:
        last_rows, whose, rows = [], [], 0
        order = sorted(range(len(spans)), key=lambda i: spans[i][1] - spans[i][0] != 1)
        order = [i for i in order if spans[i][1] > spans[i][0]]
        for i in order:
            rows += spans[i][1] - spans[i][0]
            if spans[i][1] == len(tokens[i]):
                last_rows.append(rows - 1)
                whose.append(i)
        logits = self.step(tokens, spans, last_rows, order)
        for i in order:
            done[i] = spans[i][1]
        for i, row in zip(whose, logits, strict=True):
            tokens[i].append(int(row.argmax()))

    def step(
        self,
        tokens: Sequence[list[int]],
        spans: Sequence[Span],
        logit_rows: list[int],
        order: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Logits [len(logit_rows), vocab] of a step of the sequences `order`, decodes first."""
        order = range(len(spans)) if order is None else order
        sizes = [spans[i][1] - spans[i][0] for i in order]
        positions = [torch.arange(*spans[i], dtype=torch.int32) for i in order]
        ids = [token for i in order for token in tokens[i][slice(*spans[i])]]
        inputs = StepInputs(
            token_ids=torch.tensor(ids, dtype=torch.int32),
            positions=torch.cat(positions),
            query_starts=torch.tensor([0, *sizes]).cumsum(0, dtype=torch.int32),
            context_lens=torch.tensor([spans[i][1] for i in order], dtype=torch.int32),
            block_table=self._table(len(spans))[list(order)],
            logit_rows=torch.tensor(logit_rows, dtype=torch.int32),
            num_decodes=next((at for at, n in enumerate(sizes) if n != 1), len(sizes)),
            max_query_len=max(sizes),
            max_context_len=max(spans[i][1] for i in order),
        )
        return self._model.forward(inputs.to(self._device), self._cache).clone().cpu()

    def _table(self, num_seqs: int) -> torch.Tensor:
        """Every sequence's share of the blocks, in no order."""
        width = NUM_BLOCKS // num_seqs
        shuffled = (torch.arange(num_seqs * width, dtype=torch.int32) * 7) % NUM_BLOCKS
        return shuffled.view(num_seqs, width)
