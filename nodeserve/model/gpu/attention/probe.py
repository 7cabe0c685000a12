"""Makes a model's attention backend: the best candidate that is right on this very device."""

import importlib
import importlib.metadata
from collections.abc import Iterable
from typing import Any

import torch

from nodeserve.config import ModelConfig
from nodeserve.model.gpu.attention import choice
from nodeserve.model.gpu.attention.case import TOLERANCE, make_case
from nodeserve.model.gpu.attention.choice import Facts, Kind, Phase, Refusal
from nodeserve.model.gpu.attention.libraries import (
    FlashAttn,
    Library,
    TorchVarlen,
    varlen_parameters,
)
from nodeserve.model.gpu.attention.library_parts import GatheredLibrary, PagedLibrary
from nodeserve.model.gpu.attention.paged import PagedAttention
from nodeserve.model.gpu.attention.parts import Heads, Part
from nodeserve.model.gpu.attention.reference import ReferenceAttention
from nodeserve.model.gpu.attention.tiles import table_of
from nodeserve.model.gpu.attention.triton_parts import TritonDecode, TritonPrefill

# (tokens of the step, context): ends of pages and tiles, contexts that are split, padding rows.
TRIALS: dict[Phase, tuple[tuple[tuple[int, int], ...], ...]] = {
    Phase.DECODE: (((1, 1), (1, 16), (1, 17), (1, 400), (1, 129)),),
    Phase.PREFILL: (((2, 2), (5, 40)), ((33, 33), (2, 130), (130, 200))),
}
# What lies in pages past a context: noticed where it is read as a token, and harmless where it is
# multiplied by 0, as libraries may do that take whole pages. Pages in service hold finite values.
TRAP = 1e4
CPU_CAPABILITY = (9, 0)  # what Triton's interpreter passes for


def heads_of(config: ModelConfig, block_size: int, dtype: torch.dtype) -> Heads:
    """The attention of a model, or of its shard, in pages of `block_size` tokens."""
    return Heads(config.num_heads, config.num_kv_heads, config.head_dim, block_size, dtype)


def windows_of(config: ModelConfig) -> frozenset[int | None]:
    """The windows that a model's layers have; None: a layer sees all."""
    return frozenset(config.window_of(layer) for layer in range(config.num_layers))


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch_varlen() -> Any:
    """torch's varlen_attn, or None where this torch has none."""
    try:
        return importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return None


def facts_of(heads: Heads, windows: frozenset[int | None], device: torch.device) -> Facts:
    """What is installed and what the device can do. Loads no library but torch."""
    cuda = device.type == "cuda"
    function = _torch_varlen()
    return Facts(
        heads,
        windows,
        torch.cuda.get_device_capability(device) if cuda else CPU_CAPABILITY,
        _installed("flash-attn"),
        torch.__version__,
        frozenset() if function is None else varlen_parameters(function),
        _installed("triton"),
    )


class Maker:
    """Makes parts for one model on one device."""

    def __init__(self, facts: Facts, device: torch.device) -> None:
        self._facts = facts
        self._device = device
        cuda = device.type == "cuda"
        self._num_sms = (
            torch.cuda.get_device_properties(device).multi_processor_count if cuda else 2
        )

    def part(self, kind: Kind, phase: Phase) -> Part:
        """Raises whatever a library raises that does not load."""
        heads = self._facts.heads
        match kind:
            case Kind.REFERENCE:
                return ReferenceAttention()
            case Kind.TRITON if phase is Phase.DECODE:
                return TritonDecode(heads, self._device, self._num_sms)
            case Kind.TRITON:
                return TritonPrefill(heads, table_of(self._facts.capability))
            case Kind.FLASH_PAGED | Kind.TORCH_PAGED:
                return PagedLibrary(self._library(kind))
            case Kind.FLASH_GATHERED | Kind.TORCH_GATHERED:
                beyond = self.part(Kind.TRITON, phase)
                return GatheredLibrary(self._library(kind), heads, self._device, beyond)

    def _library(self, kind: Kind) -> Library:
        if kind.wish == "flash-attn":
            return FlashAttn(importlib.import_module("flash_attn"))
        return TorchVarlen(_torch_varlen())

    def trial(self, kind: Kind, phase: Phase) -> tuple[Part | None, str]:
        """A part that was right on this device, or None and what was wrong with it."""
        heads = self._facts.heads
        try:
            part = self.part(kind, phase)
            for lengths in TRIALS[phase]:
                case = make_case(heads, lengths, self._device, trap=TRAP)
                part.reserve(case.step.num_tokens, len(lengths), 1024)
                for window in self._facts.windows:
                    error = case.error(PagedAttention(part, part, part.name), window)
                    if not error <= TOLERANCE[heads.dtype]:
                        return None, f"wrong on this device, by {error:.3g} of a row's length"
        except Exception as problem:  # noqa: BLE001  whatever a library or a compiler may raise
            first_line = (str(problem).splitlines() or [""])[0]
            return None, f"failed on this device: {type(problem).__name__}: {first_line}"
        return part, ""

    def first_right(
        self, kinds: Iterable[Kind], phase: Phase, refusals: list[Refusal]
    ) -> tuple[Kind, Part]:
        """The first kind that passes its trial; adds those that did not to `refusals`."""
        for kind in kinds:
            if kind is Kind.REFERENCE:
                break  # it is the judge
            part, reason = self.trial(kind, phase)
            if part is not None:
                return kind, part
            refusals.append(Refusal(kind, phase, reason))
        return Kind.REFERENCE, ReferenceAttention()


def make_attention(
    heads: Heads, windows: frozenset[int | None], device: torch.device, wish: str = "auto"
) -> PagedAttention:
    """The attention of a model on `device`: `wish` is one of `choice.WISHES`.

    Raises ConfigError where the wish cannot be met. The backend's `name` says what is used and why
    better kernels are not.
    """
    facts = facts_of(heads, windows, device)
    found = choice.candidates(facts, wish)
    refusals = list(found.refusals)
    maker = Maker(facts, device)
    decode_kind, decode = maker.first_right(found.decode, Phase.DECODE, refusals)
    prefill_kind, prefill = maker.first_right(found.prefill, Phase.PREFILL, refusals)
    choice.check_wish(wish, (decode_kind, prefill_kind), refusals)
    name = choice.describe(decode_kind, prefill_kind, refusals)
    return PagedAttention(decode, prefill, name)
