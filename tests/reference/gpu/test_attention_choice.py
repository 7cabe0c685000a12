"""Which attention kernels a model gets: the table, and the trial on the device."""

import dataclasses
import importlib
import subprocess
import sys
from typing import Any

import pytest
import torch

from nodeserve.errors import ConfigError
from nodeserve.model.gpu.attention import choice, probe
from nodeserve.model.gpu.attention.case import TOLERANCE, make_case
from nodeserve.model.gpu.attention.choice import Candidates, Facts, Kind, Phase
from nodeserve.model.gpu.attention.libraries import varlen_parameters
from nodeserve.model.gpu.attention.parts import Heads
from tests.fakes import attention_libraries
from tests.fakes.attention_libraries import FlashAttnModule, older_varlen_attn, varlen_attn

CPU = torch.device("cpu")
HEADS = Heads(4, 2, 64, 16, torch.bfloat16)
VARLEN = varlen_parameters(varlen_attn)
OLDER = varlen_parameters(older_varlen_attn)
SHORT = {
    "FP": Kind.FLASH_PAGED,
    "FG": Kind.FLASH_GATHERED,
    "TP": Kind.TORCH_PAGED,
    "TG": Kind.TORCH_GATHERED,
    "T": Kind.TRITON,
    "R": Kind.REFERENCE,
}


def facts(**changes: Any) -> Facts:
    """A machine with everything, but for `changes`; those of Heads by their names."""
    ours = {field.name for field in dataclasses.fields(Heads)} & set(changes)
    heads = dataclasses.replace(HEADS, **{name: changes.pop(name) for name in ours})
    base = Facts(heads, frozenset({None}), (9, 0), "2.8.3", "2.12.0", VARLEN, "3.6.0")
    return dataclasses.replace(base, **changes)


def kinds(text: str) -> tuple[Kind, ...]:
    return tuple(SHORT[name] for name in text.split())


@pytest.mark.parametrize(
    ("changes", "wish", "decode", "prefill"),
    [
        ({}, "auto", "T R", "FG T R"),
        ({"block_size": 256}, "auto", "FP TP T R", "FP FG TP T R"),
        ({"block_size": 384}, "auto", "T R", "FG T R"),
        ({"flash_attn": None}, "auto", "T R", "T R"),
        ({"flash_attn": "2.7.4.post1"}, "auto", "T R", "T R"),
        ({"flash_attn": "3.0"}, "auto", "T R", "FG T R"),
        ({"flash_attn": None, "block_size": 512}, "auto", "TP T R", "TP T R"),
        ({"flash_attn": None, "block_size": 256, "torch_varlen": OLDER}, "auto", "T R", "T R"),
        ({"flash_attn": None, "torch_varlen": frozenset()}, "auto", "T R", "T R"),
        ({"dtype": torch.float32, "block_size": 256}, "auto", "T R", "T R"),
        ({"dtype": torch.float64}, "auto", "R", "R"),
        ({"capability": (7, 5), "block_size": 256}, "auto", "R", "R"),
        ({"triton": None}, "auto", "R", "R"),
        ({"triton": None, "block_size": 256}, "auto", "FP TP R", "FP TP R"),
        ({"head_dim": 512, "block_size": 256}, "auto", "R", "R"),
        ({"head_dim": 72, "block_size": 256}, "auto", "FP TP R", "FP TP R"),
        ({"head_dim": 80}, "auto", "T R", "FG T R"),
        ({"num_heads": 256, "num_kv_heads": 1}, "auto", "R", "R"),
        ({}, "triton", "T R", "T R"),
        ({}, "reference", "R", "R"),
        ({}, "flash-attn", "T R", "FG T R"),
        ({"block_size": 256}, "flash-attn", "FP T R", "FP FG T R"),
        ({}, "torch", "T R", "TG T R"),
        ({"block_size": 256}, "torch", "TP T R", "TP TG T R"),
        ({"torch_varlen": OLDER}, "torch", "T R", "TG T R"),
    ],
)
def test_the_table(changes: dict[str, Any], wish: str, decode: str, prefill: str) -> None:
    found = choice.candidates(facts(**changes), wish)
    assert found.decode == kinds(decode)
    assert found.prefill == kinds(prefill)


@pytest.mark.parametrize(
    ("changes", "wish", "message"),
    [
        ({"flash_attn": None}, "flash-attn", "flash-attn cannot be used: not installed"),
        ({"flash_attn": "2.6.1"}, "flash-attn", "needs version 2.8, 2.6.1 is installed"),
        ({"dtype": torch.float32}, "flash-attn", "needs bfloat16 or float16, .* float32"),
        ({"capability": (7, 5)}, "triton", "needs compute capability 8.0, the device has 7.5"),
        ({"torch_varlen": frozenset()}, "torch", "torch 2.12.0 has no varlen_attn"),
        (
            {"torch_varlen": OLDER, "windows": frozenset({None, 4096})},
            "torch",
            "takes no block table; varlen_attn of torch 2.12.0 knows no window",
        ),
        ({"triton": None}, "triton", "not installed"),
        ({"triton": None}, "flash-attn", "gathers with triton, which says: not installed"),
        ({"head_dim": 264}, "triton", "multiple of 16 up to 256 as head size, not 264"),
        ({"num_heads": 258}, "triton", "up to 128 query heads per K/V head, not 129"),
        ({}, "xformers", "unknown; choose one of auto, flash-attn, torch, triton, reference"),
    ],
)
def test_a_wish_that_cannot_be_met(changes: dict[str, Any], wish: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choice.candidates(facts(**changes), wish)


def described(found: Candidates) -> str:
    return choice.describe(found.decode[0], found.prefill[0], found.refusals)


def test_the_description_says_why_better_kernels_are_not_used() -> None:
    old = facts(flash_attn=None, torch_varlen=OLDER, torch_version="2.11.0")
    assert described(choice.candidates(old, "auto")) == (
        "triton (flash-attn: not installed; "
        "torch: varlen_attn of torch 2.11.0 takes no block table)"
    )
    assert described(choice.candidates(facts(block_size=256), "auto")) == "flash-attn"
    assert described(choice.candidates(facts(), "triton")) == "triton"
    mixed = described(choice.candidates(facts(), "flash-attn"))
    assert mixed == (
        "prefill flash-attn over gathered pages, decode triton "
        "(flash-attn: needs a block size that 256 divides, not 16)"
    )


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> FlashAttnModule:
    """Both libraries are there, and this torch's own is not asked."""
    module = FlashAttnModule()
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    versions = {"flash-attn": "2.8.3", "triton": "3.6.0"}
    monkeypatch.setattr(probe, "_installed", versions.get)
    monkeypatch.setattr(probe, "_torch_varlen", lambda: varlen_attn)
    monkeypatch.setattr(probe, "varlen_parameters_of_torch", lambda: VARLEN)
    return module


def make(block_size: int, wish: str = "auto", window: int | None = None) -> tuple[str, float]:
    """The name of the backend that is made, and its error on a step that was not its trial."""
    heads = dataclasses.replace(HEADS, block_size=block_size)
    backend = probe.make_attention(heads, frozenset({None, window}), CPU, wish)
    case = make_case(heads, [(1, 40), (1, 3), (9, 30)], CPU, seed=7, trap=probe.TRAP)
    backend.reserve(16, 4, 64)
    return backend.name, case.error(backend, window)


@pytest.mark.parametrize(
    ("block_size", "wish", "name"),
    [
        (256, "auto", "flash-attn"),
        (256, "torch", "torch"),
        (16, "triton", "triton"),
        (16, "reference", "reference"),
        (16, "torch", "prefill torch over gathered pages, decode triton"),
        (16, "auto", "prefill flash-attn over gathered pages, decode triton"),
    ],
)
def test_what_is_made(libraries: FlashAttnModule, block_size: int, wish: str, name: str) -> None:
    made, error = make(block_size, wish, window=20)
    assert made.split(" (")[0] == name
    assert error < TOLERANCE[HEADS.dtype]


def test_a_library_that_raises_is_passed_over(
    libraries: FlashAttnModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **named: Any) -> None:
        raise RuntimeError("no kernel image is available\nfor execution on the device")

    monkeypatch.setattr(libraries, "flash_attn_with_kvcache", broken)
    name, error = make(256)
    reason = "failed on this device: RuntimeError: no kernel image is available"
    assert name == f"prefill flash-attn, decode torch (flash-attn: {reason})"
    assert error < TOLERANCE[HEADS.dtype]


def test_a_library_that_is_wrong_is_passed_over(
    libraries: FlashAttnModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = attention_libraries._attention

    def off_by_one(*arguments: Any) -> torch.Tensor:
        query, keys, values, causal, window = arguments
        return right(query, keys, values, causal, (max(window[0], 0) + 1, window[1]))

    monkeypatch.setattr(attention_libraries, "_attention", off_by_one)
    name, error = make(256)
    assert name.startswith("triton (flash-attn: wrong on this device, by ")
    assert "torch: wrong on this device" in name
    assert error < TOLERANCE[HEADS.dtype]
    with pytest.raises(ConfigError, match="torch cannot be used: wrong on this device"):
        make(256, "torch")


def test_flash_attn_is_loaded_only_where_it_may_run(
    libraries: FlashAttnModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # importing it fails
    assert make(16, "triton")[0] == "triton"
    name, _ = make(16)
    assert "flash-attn: failed on this device: ModuleNotFoundError" in name


def test_where_no_kernel_is_right_the_reference_serves(
    libraries: FlashAttnModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "TOLERANCE", {HEADS.dtype: -1.0})
    name, error = make(16)
    assert name.startswith("reference (")
    assert error == 0
    with pytest.raises(ConfigError, match="triton cannot be used: wrong on this device"):
        make(16, "triton")


def test_this_machine_is_described() -> None:
    """No fakes: whatever is installed here, a backend comes out and is right."""
    name, error = make(16)
    assert name
    assert error < TOLERANCE[HEADS.dtype]
    assert {kind for phase in Phase for kind in choice.ORDER[phase]} == set(Kind)


def test_torchs_parameters_are_read_without_loading_its_compiler() -> None:
    script = (
        "import sys; from nodeserve.model.gpu.attention.probe import varlen_parameters_of_torch;"
        "print(*sorted(varlen_parameters_of_torch()), 'torch._dynamo' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    *found, loaded = done.stdout.split()
    assert loaded == "False"
    installed = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    assert frozenset(found) == varlen_parameters(installed)
