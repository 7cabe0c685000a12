"""Attention of plain torch behind the GPU's signature, made-up models and steps, two spies."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nodeserve.config import ModelConfig
from nodeserve.model.gpu.step import GpuStep
from nodeserve.model.inputs import StepInputs


def config_of(num_heads: int = 6, num_kv_heads: int = 2, **rest: object) -> ModelConfig:
    values: dict[str, object] = {
        "architecture": "llama",
        "vocab_size": 211,
        "hidden_size": 96,
        "intermediate_size": 200,
        "num_layers": 2,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": 64,
        "max_position": 1024,
        "norm_eps": 1e-5,
        "rope_theta": 10000.0,
    }
    return ModelConfig(**{**values, **rest})  # type: ignore[arg-type]


class PlainAttention:
    """Row by row, in float32; reads tensors on the host, so it cannot be captured."""

    name = "plain"

    def reserve(self, max_tokens: int, max_seqs: int, max_context_len: int) -> None:
        pass

    def plan(self, step: GpuStep) -> None:
        pass

    def attend(
        self,
        query: torch.Tensor,
        pages: torch.Tensor,
        step: GpuStep,
        out: torch.Tensor,
        window: int | None,
    ) -> None:
        starts, lens = step.query_starts.tolist(), step.context_lens.tolist()
        group = query.size(1) // pages.size(2)
        for seq, context in enumerate(lens):
            blocks = step.block_table[seq, : -(-context // pages.size(3))].long()
            keys, values = (
                pages[blocks].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :context].float()
            )
            keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
            for row in range(starts[seq], starts[seq + 1]):
                last = int(step.positions[row]) + 1
                seen = slice(max(last - (window or last), 0), last)
                scores = torch.einsum("hd,hcd->hc", query[row].float(), keys[:, seen])
                weights = (scores * query.size(2) ** -0.5).softmax(-1)
                out[row] = torch.einsum("hc,hcd->hd", weights, values[:, seen]).to(out.dtype)


def random_state(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Weights by hub name; norms and biases far enough from 1 and 0 that a missing one shows."""
    generator = torch.Generator().manual_seed(7)

    def made(*shape: int, spread: float = 0.08, mean: float = 0.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * spread + mean

    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    width, inner = config.hidden_size, config.intermediate_size
    state = {
        "model.embed_tokens.weight": made(config.vocab_size, width, spread=1.0),
        "model.norm.weight": made(width, spread=0.3, mean=1.0),
        "lm_head.weight": made(config.vocab_size, width),
    }
    for layer in range(config.num_layers):
        at = f"model.layers.{layer}"
        for name, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            state[f"{at}.self_attn.{name}_proj.weight"] = made(rows, width)
            state[f"{at}.self_attn.{name}_proj.bias"] = made(rows, spread=0.3)
        for name in ("q", "k"):
            norm = made(config.head_dim, spread=0.3, mean=1.0)
            state[f"{at}.self_attn.{name}_norm.weight"] = norm
        state[f"{at}.self_attn.o_proj.weight"] = made(width, heads)
        state[f"{at}.mlp.gate_proj.weight"] = made(inner, width)
        state[f"{at}.mlp.up_proj.weight"] = made(inner, width)
        state[f"{at}.mlp.down_proj.weight"] = made(width, inner)
        for name in ("input_layernorm", "post_attention_layernorm"):
            state[f"{at}.{name}.weight"] = made(width, spread=0.3, mean=1.0)
    return state


def step_of(
    spans: list[tuple[int, int]],
    blocks: list[list[int]],
    token_ids: list[list[int]],
    block_size: int,
) -> StepInputs:
    """Per sequence: its tokens [first, last) of this step, its blocks, and all its token ids."""

    def int32(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    counts = [last - first for first, last in spans]
    ends = list(accumulate(counts))
    table = torch.full((len(spans), max(map(len, blocks))), -1, dtype=torch.int32)
    for row, one in enumerate(blocks):
        table[row, : len(one)] = int32(one)
    pieces = [ids[a:b] for ids, (a, b) in zip(token_ids, spans, strict=True)]
    return StepInputs(
        token_ids=int32(sum(pieces, [])),
        positions=int32([p for first, last in spans for p in range(first, last)]),
        query_starts=int32([0, *ends]),
        context_lens=int32([last for _, last in spans]),
        block_table=table,
        logit_rows=int32([end - 1 for end in ends]),
        num_decodes=next((i for i, n in enumerate(counts) if n != 1), len(counts)),
        max_query_len=max(counts),
        max_context_len=max(last for _, last in spans),
    )


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Names of the torch operations that ran."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


class Silent:
    """A kernel that is launched and computes nothing: Triton's interpreter copies with torch."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: None
