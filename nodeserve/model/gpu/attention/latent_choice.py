"""Makes a model's attention over latents: our kernels where they are right on this very device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nodeserve.errors import ConfigError
from nodeserve.model.gpu.attention.case import TOLERANCE, step_of
from nodeserve.model.gpu.attention.choice import HALVES, WISHES
from nodeserve.model.gpu.attention.latent_parts import (
    MAX_RANK,
    MAX_TURNED,
    LatentDecode,
    LatentHeads,
    LatentPrefill,
    LatentReference,
)
from nodeserve.model.gpu.attention.paged import PagedAttention
from nodeserve.model.gpu.attention.probe import CPU_CAPABILITY, TRAP, TRIALS
from nodeserve.model.gpu.step import AttentionBackend, GpuStep

MARKS = 8  # large latents in a context, beside its first and its last ones


@dataclass(frozen=True, slots=True)
class LatentCase:
    """The arguments of one call of attention over latents."""

    query: torch.Tensor  # [num_tokens, num_heads, rank + turned]
    pages: torch.Tensor  # [num_blocks, 1, 1, block_size, rank + turned], strided
    step: GpuStep
    heads: LatentHeads

    def run(self, backend: AttentionBackend) -> torch.Tensor:
        """The backend's answer, [num_tokens, num_heads, rank]; rows it leaves out are NaN."""
        shape = (*self.query.shape[:2], self.heads.rank)
        out = torch.full(shape, torch.nan, dtype=self.query.dtype, device=self.query.device)
        backend.plan(self.step)
        backend.attend(self.query, self.pages, self.step, out, None)
        return out

    def error(self, backend: AttentionBackend) -> float:
        """The largest distance of a row from the reference's, in lengths of that row."""
        judge = LatentReference(self.heads)
        wanted = self.run(PagedAttention(judge, judge, judge.name)).float()
        distance = (self.run(backend).float() - wanted).norm(dim=-1)
        return float((distance / wanted.norm(dim=-1).clamp_min(1e-30)).max())


def make_latent_case(
    heads: LatentHeads,
    lengths: Sequence[tuple[int, int]],
    device: torch.device,
    *,
    seed: int = 0,
    num_layers: int = 2,
    trap: float = torch.nan,
) -> LatentCase:
    """A step of sequences given as (tokens of this step, context), as for `case.make_case`.

    A few latents of every context are large, and point away from each other, so that one that is
    left out, or read in another's place, is noticed in a context of any length.
    """
    generator = torch.Generator(device).manual_seed(seed)
    counts = [-(-context // heads.block_size) for _, context in lengths]
    num_blocks, width = sum(counts) + 1, heads.rank + heads.turned
    shape = (num_blocks, num_layers, 1, 1, heads.block_size, width)
    pages = torch.full(shape, trap, dtype=heads.dtype, device=device)[:, num_layers - 1]
    order = torch.randperm(num_blocks, generator=generator, device=device)
    blocks = torch.split(order, [*counts, 1])
    table = torch.full((len(lengths), max(counts) + 1), -1, dtype=torch.int32, device=device)
    for seq, (_, context) in enumerate(lengths):
        table[seq, : counts[seq]] = blocks[seq]
        if context:
            at = torch.arange(context, device=device)
            latents = _latents(heads, context, generator).to(heads.dtype)
            pages[blocks[seq][at // heads.block_size], 0, 0, at % heads.block_size] = latents
    rows = (sum(tokens for tokens, _ in lengths), heads.num_heads, width)
    # Scores of about 1, as a trained model's: then every latent has a say in the result.
    spread = 1.0 / (heads.scale * width**0.5)
    query = torch.randn(rows, generator=generator, device=device) * spread
    step = step_of(heads.block_size, lengths, table)
    return LatentCase(query.to(heads.dtype), pages, step, heads)


def _latents(heads: LatentHeads, context: int, generator: torch.Generator) -> torch.Tensor:
    """[context, rank + turned] float32"""
    device = generator.device
    latents = torch.randn(context, heads.rank + heads.turned, generator=generator, device=device)
    marks = torch.randint(context, (MARKS,), generator=generator, device=device)
    edges = torch.tensor([0, max(context - 2, 0), context - 1], device=device)
    loud = torch.zeros(context, 1, device=device)
    loud[torch.cat([marks, edges])] = min(context**0.5, 3.0)
    return latents * (1 + loud)


def refusal(heads: LatentHeads, capability: tuple[int, int]) -> str | None:
    """Why our kernels cannot compute what a model needs; None: they can, as far as is known."""
    if capability < (8, 0):
        has = ".".join(map(str, capability))
        return f"triton: needs compute capability 8.0, the device has {has}"
    if heads.dtype not in (*HALVES, torch.float32):
        return f"triton: needs bfloat16, float16 or float32, the model is {heads.dtype}"
    if heads.rank > MAX_RANK or heads.turned > MAX_TURNED or (heads.rank + heads.turned) % 8:
        return (
            f"triton: takes latents up to {MAX_RANK} with keys up to {MAX_TURNED}, together a"
            f" multiple of 8, not {heads.rank} and {heads.turned}"
        )
    return None


def make_latent_attention(
    heads: LatentHeads, device: torch.device, wish: str = "auto"
) -> PagedAttention:
    """The attention of a model with latents on `device`; `wish` is one of `choice.WISHES`.

    Raises ConfigError where the wish cannot be met. The backend's `name` says what is used and why
    not something better.
    """
    if wish not in ("auto", "triton", "reference"):
        known = wish in WISHES
        reason = "reads keys and values, and this model keeps latents" if known else "is unknown"
        raise ConfigError(
            f"attention backend {wish} {reason}: use --attention-backend auto, triton or reference"
        )
    judge = LatentReference(heads)
    if wish == "reference":
        return PagedAttention(judge, judge, judge.name)
    ours, reason = _trial(heads, device)
    if ours is not None:
        return ours
    if wish == "triton":
        raise ConfigError(
            f"attention backend triton cannot be used: {reason}. Leave --attention-backend at auto"
        )
    return PagedAttention(judge, judge, f"{judge.name} ({reason})")


def _trial(heads: LatentHeads, device: torch.device) -> tuple[PagedAttention | None, str]:
    """Our kernels if they were right on this device, or None and what was wrong with them."""
    cuda = device.type == "cuda"
    capability = torch.cuda.get_device_capability(device) if cuda else CPU_CAPABILITY
    if reason := refusal(heads, capability):
        return None, reason
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count if cuda else 2
    try:
        decode = LatentDecode(heads, device, num_sms, capability)
        backend = PagedAttention(decode, LatentPrefill(heads, capability), decode.name)
        for lengths in (trial for trials in TRIALS.values() for trial in trials):
            case = make_latent_case(heads, lengths, device, trap=TRAP)
            backend.reserve(case.step.num_tokens, len(lengths), 1024)
            if not (error := case.error(backend)) <= TOLERANCE[heads.dtype]:
                return None, f"triton: wrong on this device, by {error:.3g} of a row's length"
    except Exception as problem:  # noqa: BLE001  whatever a library or a compiler may raise
        first_line = (str(problem).splitlines() or [""])[0]
        return None, f"triton: failed on this device: {type(problem).__name__}: {first_line}"
    return backend, ""
