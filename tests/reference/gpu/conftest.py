"""The device of these tests: a GPU where there is one, else a CPU with Triton's interpreter."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="GPU kernels need triton")


@pytest.fixture(scope="session")
def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    if not triton.knobs.runtime.interpret:
        pytest.skip("no usable GPU, and TRITON_INTERPRET is not set: see tests/conftest.py")
    return torch.device("cpu")
