"""The whole decoder with the attention that a machine would choose, against plain torch."""

import pytest
import torch

from nodeserve.model.gpu.attention import probe
from nodeserve.model.gpu.ops import CudaOps
from nodeserve.model.ops_torch import TorchOps
from tests.reference.gpu.test_gpu_model import BLOCK_SIZE, FAMILIES, PROMPTS, TOLERANCE, Lab, _steps


@pytest.mark.parametrize("family", ["llama3-tied", "mistral", "qwen3"])
def test_a_decoder_with_its_kernels(family: str, device: torch.device) -> None:
    """Chunked prompts beside decodes, with 1 to 6 heads per K/V head, windows, odd head sizes."""
    config, dtype = FAMILIES[family], torch.float32
    heads = probe.heads_of(config, BLOCK_SIZE, dtype)
    backend = probe.make_attention(heads, probe.windows_of(config), device, "triton")
    assert backend.name == "triton"
    ops = CudaOps(dtype, device, backend)
    backend.reserve(16, 4, 32)
    judge, ours = Lab(config, TorchOps(dtype)), Lab(config, ops)
    for inputs in _steps([prompt + [17, 3, 99] for prompt in PROMPTS]):
        theirs, mine = judge.run(inputs), ours.run(inputs)
        assert (mine - theirs).abs().max() < TOLERANCE[dtype] * theirs.abs().max()
        assert torch.equal(mine.argmax(-1), theirs.argmax(-1))
