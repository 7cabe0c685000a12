"""The whole decoder on GPU operations against plain torch, and what a CUDA graph asks of it."""

from dataclasses import replace

import pytest
import torch

from nodeserve.config import ModelConfig, RopeScaling
from nodeserve.errors import ModelError
from nodeserve.model import families, kv
from nodeserve.model.gpu import norm, pointwise, rope
from nodeserve.model.gpu.ops import CudaOps
from nodeserve.model.gpu.step import GpuStep
from nodeserve.model.inputs import StepInputs
from nodeserve.model.ops import Ops
from nodeserve.model.ops_torch import TorchOps
from nodeserve.model.quantised import Weight
from tests.reference.gpu.plain import (
    PlainAttention,
    Recorder,
    Silent,
    config_of,
    random_state,
    step_of,
)

SMALL = config_of()
FAMILIES = {
    "llama": SMALL,
    "llama3-tied": replace(
        SMALL,
        tie_embeddings=True,
        num_kv_heads=6,
        rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 64),
    ),
    "mistral": replace(SMALL, sliding_window=9, num_kv_heads=3),
    "qwen2": replace(SMALL, attention_bias=True, num_kv_heads=1, hidden_size=70),
    "qwen3": replace(SMALL, qk_norm=True, head_dim=80),
}
TOLERANCE = {torch.float32: 3e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
NUM_BLOCKS = 12
SCRATCH = NUM_BLOCKS - 1
BLOCK_SIZE = 4
BLOCKS = [[6, 4], [2], [1, 5]]
PROMPTS = [[(7 * i * i + n) % 211 for i in range(n)] for n in (6, 1, 3)]
CASES = [(family, torch.float32) for family in FAMILIES]
CASES += [("qwen3", torch.bfloat16), ("llama", torch.float16)]


class Lab:
    """One model on one backend, with its pages."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        state = random_state(config)
        self.device = ops.device
        self.model = families.build(config, state.__getitem__, ops)
        layout = kv.layout_of(config, BLOCK_SIZE, ops.dtype)
        size = NUM_BLOCKS * layout.block_bytes
        self.cache = ops.cache(layout, torch.zeros(size, dtype=torch.uint8, device=ops.device))

    def run(self, inputs: StepInputs) -> torch.Tensor:
        return self.model.forward(inputs.to(self.device), self.cache).clone().cpu()


def _steps(tokens: list[list[int]]) -> list[StepInputs]:
    """Chunked prompts joined with decodes over a page's end: 6 + 2, 1 + 2 and 3 + 3 tokens."""
    plan = [
        {2: (0, 3)},
        {2: (3, 4), 0: (0, 2)},
        {2: (4, 5), 0: (2, 6), 1: (0, 1)},
        {0: (6, 7), 1: (1, 2), 2: (5, 6)},
        {0: (7, 8), 1: (2, 3)},
    ]
    return [
        step_of(
            list(spans.values()), [BLOCKS[s] for s in spans], [tokens[s] for s in spans], BLOCK_SIZE
        )
        for spans in plan
    ]


@pytest.mark.parametrize(("family", "dtype"), CASES, ids=str)
def test_logits_and_greedy_tokens_equal_plain_torch(
    device: torch.device, family: str, dtype: torch.dtype
) -> None:
    config = FAMILIES[family]
    judge, ours = (
        Lab(config, TorchOps(dtype)),
        Lab(config, CudaOps(dtype, device, PlainAttention())),
    )
    tokens = [prompt + [0] * 3 for prompt in PROMPTS]
    for place in range(5):
        inputs = _steps(tokens)[place]
        theirs, mine = judge.run(inputs), ours.run(inputs)
        scale = float(theirs.abs().max())
        assert (mine - theirs).abs().max() < TOLERANCE[dtype] * scale
        if dtype == torch.float32:  # coarser types have ties
            assert torch.equal(mine.argmax(-1), theirs.argmax(-1))
            ends = inputs.context_lens.tolist()
            seqs = [BLOCKS.index(_blocks_of(row)) for row in inputs.block_table]
            for seq, end, token in zip(seqs, ends, theirs.argmax(-1).tolist(), strict=True):
                if len(PROMPTS[seq]) <= end < len(tokens[seq]):
                    tokens[seq][end] = token
    wanted, found = (lab.cache.pages.float().cpu() for lab in (judge, ours))
    assert (found - wanted).abs().max() < TOLERANCE[dtype] * wanted.abs().max()


def _blocks_of(row: torch.Tensor) -> list[int]:
    return [block for block in row.tolist() if block >= 0]


def _decode_step(num_padded: int = 0) -> StepInputs:
    spans = [(6, 7), (1, 2), (3, 4)] + [(0, 1)] * num_padded
    blocks = BLOCKS + [[SCRATCH]] * num_padded
    return step_of(spans, blocks, [[9] * 40 for _ in spans], BLOCK_SIZE)


def test_padding_rows_change_no_real_row_and_write_to_the_scratch_block_alone(
    device: torch.device,
) -> None:
    labs = [Lab(SMALL, CudaOps(torch.float32, device, PlainAttention())) for _ in range(2)]
    before = torch.randn(labs[0].cache.pages.shape).to(device)
    logits = []
    for lab, num_padded in zip(labs, (0, 5), strict=True):
        lab.cache.pages.copy_(before)
        logits.append(lab.run(_decode_step(num_padded)))
    torch.testing.assert_close(logits[1][:3], logits[0], rtol=1e-5, atol=1e-5)
    plain, padded = (lab.cache.pages for lab in labs)
    torch.testing.assert_close(padded[:SCRATCH], plain[:SCRATCH], rtol=1e-5, atol=1e-5)
    assert torch.equal(plain[SCRATCH], before[SCRATCH])
    assert not torch.equal(padded[SCRATCH], before[SCRATCH])


class NoAttention(PlainAttention):
    """Leaves torch alone, so that what is recorded is the model's own."""

    def attend(
        self,
        query: torch.Tensor,
        pages: torch.Tensor,
        step: GpuStep,
        out: torch.Tensor,
        window: int | None,
    ) -> None:
        pass


def test_a_reserved_step_neither_allocates_nor_reads_on_the_host(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of torch, only products into given memory, row gathers and views: what a graph can hold."""
    config = replace(SMALL, attention_bias=True, qk_norm=True)
    lab = Lab(config, CudaOps(torch.float32, device, NoAttention()))
    lab.model.reserve(max_tokens=8, max_logit_rows=4, max_seqs=4, max_context_len=64)
    inputs = _decode_step(1).to(device)
    if device.type == "cpu":
        for module in (norm, pointwise, rope):
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                monkeypatch.setattr(module, name, Silent())
    with Recorder() as recorder:
        logits = lab.model.forward(inputs, lab.cache)
    allowed = {"aten.mm.out", "aten.addmm.out", "aten.index_select.out", "aten.t.default"}
    allowed |= {"aten.view.default", "aten.slice.Tensor", "aten.detach.default"}
    assert recorder.names <= allowed
    assert "aten.mm.out" in recorder.names
    again = lab.model.forward(inputs, lab.cache)
    assert again.data_ptr() == logits.data_ptr()


def test_a_step_above_what_was_reserved_is_refused(device: torch.device) -> None:
    lab = Lab(SMALL, CudaOps(torch.float32, device, PlainAttention()))
    lab.model.reserve(max_tokens=3, max_logit_rows=3, max_seqs=3, max_context_len=64)
    lab.run(_decode_step())
    with pytest.raises(AssertionError, match="4 (rows|tokens), reserved are 3"):
        lab.run(_decode_step(1))


def test_a_context_beyond_the_rotary_tables_is_refused(device: torch.device) -> None:
    lab = Lab(SMALL, CudaOps(torch.float32, device, PlainAttention()))
    beyond = replace(_decode_step(), max_context_len=SMALL.max_position + 1)
    with pytest.raises(ModelError, match=r"1025 tokens.*1024 positions.*--max-model-len"):
        lab.run(beyond)


def test_tied_weights_are_on_the_device_once(device: torch.device) -> None:
    moved: list[int] = []

    class Counting(CudaOps):
        def _own(self, weight: Weight, dtype: torch.dtype | None = None) -> torch.Tensor:
            moved.append(id(weight))
            return super()._own(weight, dtype)

    config, ops = FAMILIES["llama3-tied"], Counting(torch.float16, device, PlainAttention())
    state = random_state(config)
    families.build(config, state.__getitem__, ops)
    assert moved.count(id(state["model.embed_tokens.weight"])) == 1
