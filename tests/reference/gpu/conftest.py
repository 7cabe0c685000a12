"""The device of these tests: a GPU where there is one, else a CPU with Triton's interpreter."""

import importlib.util

import pytest
import torch

# There are machines without a triton, and nothing but these kernels needs one.
collect_ignore_glob = ["test_*.py"]
if importlib.util.find_spec("triton"):
    collect_ignore_glob.clear()
    importlib.import_module("tests.fakes.interpreter")  # repairs it


@pytest.fixture(scope="session")
def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    triton = importlib.import_module("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("no usable GPU, and TRITON_INTERPRET is not set: see tests/conftest.py")
    return torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread_each(one_thread: None) -> None:
    """Of torch, whose operations are small here: the kernels are interpreted."""
