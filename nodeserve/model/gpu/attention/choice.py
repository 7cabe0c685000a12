"""Which kernels may run a model's attention, best first, and why the others may not.

Pure: what is installed and what the device can do come in as values. Whether the candidates then
do what they promise is `probe.py`'s to find out.
"""

import enum
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from nodeserve.errors import ConfigError
from nodeserve.model.gpu.attention.parts import Heads
from nodeserve.model.gpu.attention.tiles import MAX_GROUP, MAX_HEAD_DIM

WISHES = ("auto", "flash-attn", "torch", "triton", "reference")
MIN_FLASH_ATTN = (2, 8)
LIBRARY_PAGE = 256  # tokens: libraries read pages of a multiple of this
HALVES = (torch.bfloat16, torch.float16)


class Phase(enum.Enum):
    DECODE = "decode"
    PREFILL = "prefill"


class Kind(enum.Enum):
    """A way to compute attention. The value is its name in logs."""

    FLASH_PAGED = "flash-attn"
    FLASH_GATHERED = "flash-attn over gathered pages"
    TORCH_PAGED = "torch"
    TORCH_GATHERED = "torch over gathered pages"
    TRITON = "triton"
    REFERENCE = "reference"

    @property
    def wish(self) -> str:
        """The wish that asks for it."""
        return self.value.split()[0]


# Best first, by what is known of the kernels: nobody has measured ours beside them. Gathering is a
# copy that only a prompt's many queries are worth. torch's own over gathered keys comes when it is
# asked for. The reference is for machines where nothing else runs.
ORDER: dict[Phase, tuple[Kind, ...]] = {
    Phase.DECODE: (Kind.FLASH_PAGED, Kind.TORCH_PAGED, Kind.TRITON, Kind.REFERENCE),
    Phase.PREFILL: (
        Kind.FLASH_PAGED,
        Kind.FLASH_GATHERED,
        Kind.TORCH_PAGED,
        Kind.TRITON,
        Kind.TORCH_GATHERED,
        Kind.REFERENCE,
    ),
}


@dataclass(frozen=True, slots=True)
class Facts:
    """What the choice rests on."""

    heads: Heads
    windows: frozenset[int | None]  # of the model's layers
    capability: tuple[int, int]  # compute capability of the device
    flash_attn: str | None  # installed version
    torch_version: str
    torch_varlen: frozenset[str]  # parameters of torch's varlen_attn; empty: not there
    triton: str | None  # installed version


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a kind cannot be used."""

    kind: Kind
    phase: Phase
    reason: str


@dataclass(frozen=True, slots=True)
class Candidates:
    """What may be tried, best first, and what may not."""

    decode: tuple[Kind, ...]
    prefill: tuple[Kind, ...]
    refusals: tuple[Refusal, ...]

    def of(self, phase: Phase) -> tuple[Kind, ...]:
        return self.decode if phase is Phase.DECODE else self.prefill


def version_of(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.8.3.post1" is (2, 8, 3)."""
    numbers: list[int] = []
    for part in text.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _library_refusal(facts: Facts) -> str | None:
    """What both libraries refuse: they are the same kernels."""
    heads = facts.heads
    if facts.capability < (8, 0):
        return f"needs compute capability 8.0, the device has {_dotted(facts.capability)}"
    if heads.dtype not in HALVES:
        return f"needs bfloat16 or float16, the model is {_type_name(heads.dtype)}"
    if heads.head_dim > MAX_HEAD_DIM or heads.head_dim % 8:
        return f"needs a multiple of 8 up to {MAX_HEAD_DIM} as head size, not {heads.head_dim}"
    return None


def _paged_refusal(facts: Facts) -> str | None:
    if facts.heads.block_size % LIBRARY_PAGE:
        return f"needs a block size that {LIBRARY_PAGE} divides, not {facts.heads.block_size}"
    return None


def _flash_refusal(facts: Facts) -> str | None:
    if facts.flash_attn is None:
        return "not installed"
    if version_of(facts.flash_attn) < MIN_FLASH_ATTN:
        return f"needs version 2.8, {facts.flash_attn} is installed"
    return _library_refusal(facts)


def _torch_refusal(facts: Facts) -> str | None:
    if not facts.torch_varlen:
        return f"torch {facts.torch_version} has no varlen_attn"
    if facts.windows != {None} and "window_size" not in facts.torch_varlen:
        return f"varlen_attn of torch {facts.torch_version} knows no window"
    return _library_refusal(facts)


def _torch_paged_refusal(facts: Facts) -> str | None:
    if facts.torch_varlen and not {"block_table", "seqused_k"} <= facts.torch_varlen:
        return f"varlen_attn of torch {facts.torch_version} takes no block table"
    return _torch_refusal(facts) or _paged_refusal(facts)


def _triton_refusal(facts: Facts) -> str | None:
    heads = facts.heads
    if facts.triton is None:
        return "not installed"
    if facts.capability < (8, 0):
        return f"needs compute capability 8.0, the device has {_dotted(facts.capability)}"
    if heads.dtype not in (*HALVES, torch.float32):
        return f"needs bfloat16, float16 or float32, the model is {_type_name(heads.dtype)}"
    if heads.head_dim > MAX_HEAD_DIM or heads.head_dim % 16:
        return f"needs a multiple of 16 up to {MAX_HEAD_DIM} as head size, not {heads.head_dim}"
    if heads.group > MAX_GROUP:
        return f"takes up to {MAX_GROUP} query heads per K/V head, not {heads.group}"
    return None


def refusal(kind: Kind, facts: Facts) -> str | None:
    """Why a kind cannot compute what a model needs; None: it can, as far as is known."""
    match kind:
        case Kind.FLASH_PAGED:
            return _flash_refusal(facts) or _paged_refusal(facts)
        case Kind.FLASH_GATHERED:
            return _flash_refusal(facts) or _gather_refusal(facts)
        case Kind.TORCH_PAGED:
            return _torch_paged_refusal(facts)
        case Kind.TORCH_GATHERED:
            return _torch_refusal(facts) or _gather_refusal(facts)
        case Kind.TRITON:
            return _triton_refusal(facts)
        case Kind.REFERENCE:
            return None


def _gather_refusal(facts: Facts) -> str | None:
    reason = _triton_refusal(facts)
    return None if reason is None else f"gathers with triton, which says: {reason}"


def _order(phase: Phase, wish: str) -> Iterable[Kind]:
    """What is tried in a phase: what was asked for, then the best that fills its gaps."""
    order = ORDER[phase]
    if wish == "auto":
        return [kind for kind in order if kind is not Kind.TORCH_GATHERED]
    if wish == "reference":
        return [Kind.REFERENCE]
    return [
        *(kind for kind in order if kind.wish == wish),
        *(kind for kind in order if kind in (Kind.TRITON, Kind.REFERENCE) and kind.wish != wish),
    ]


def candidates(facts: Facts, wish: str) -> Candidates:
    """Raises ConfigError where a wish cannot be met in any phase: it says why."""
    if wish not in WISHES:
        raise ConfigError(f"attention backend {wish!r} is unknown; choose one of {_listed(WISHES)}")
    possible: dict[Phase, tuple[Kind, ...]] = {}
    refusals: list[Refusal] = []
    for phase in Phase:
        reasons = {kind: refusal(kind, facts) for kind in _order(phase, wish)}
        possible[phase] = tuple(kind for kind, reason in reasons.items() if reason is None)
        refusals += [Refusal(kind, phase, reason) for kind, reason in reasons.items() if reason]
    found = Candidates(possible[Phase.DECODE], possible[Phase.PREFILL], tuple(refusals))
    check_wish(wish, {kind for phase in Phase for kind in found.of(phase)}, found.refusals)
    return found


def check_wish(wish: str, used: Iterable[Kind], refusals: Iterable[Refusal]) -> None:
    """Raises ConfigError where nothing of what was asked for is among the kinds used."""
    if wish == "auto" or any(kind.wish == wish for kind in used):
        return
    reasons = dict.fromkeys(item.reason for item in refusals if item.kind.wish == wish)
    raise ConfigError(
        f"attention backend {wish} cannot be used: {'; '.join(reasons)}. "
        "Choose another with --attention-backend, or leave it at auto"
    )


def describe(decode: Kind, prefill: Kind, refusals: Iterable[Refusal]) -> str:
    """One line for logs and status, such as "triton (flash-attn: not installed)".

    Reasons are those of kinds that would have come before the ones in use.
    """
    used = {Phase.DECODE: decode, Phase.PREFILL: prefill}
    reasons: dict[str, None] = {}
    for item in refusals:
        order = ORDER[item.phase]
        if order.index(item.kind) < order.index(used[item.phase]):
            reasons[f"{item.kind.wish}: {item.reason}"] = None
    apart = f"prefill {prefill.value}, decode {decode.value}"
    text = decode.value if decode is prefill else apart
    return f"{text} ({'; '.join(reasons)})" if reasons else text


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
