"""The device of these tests: a GPU where there is one, else a CPU with Triton's interpreter."""

import importlib.util

import pytest
import torch

# There are machines without a triton, and nothing but these kernels needs one.
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    triton = importlib.import_module("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("no usable GPU, and TRITON_INTERPRET is not set: see tests/conftest.py")
    return torch.device("cpu")
