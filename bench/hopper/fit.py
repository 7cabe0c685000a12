"""Fits the cost model's terms to kernel times, and the two numbers of the engine to runs on H100.

    python -m bench.hopper.fit

prints the terms that nodeserve/policy/kernel_fits.py has for both. The engine's numbers come from
measured runs of vLLM with Llama 3.1 70B on H100 (aic_measured_ttft_tpot.csv); runs on H200 are
never used.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from statistics import fmean, median
from typing import NamedTuple

from bench.hopper.kernels import (
    MODELS,
    Engine,
    Model,
    decode_ms,
    missing,
    nonnegative_fit,
    prefill_ms,
    rows,
)
from nodeserve.policy.kernel_fits import LARGE_SEQS

DEGREES = (1, 2, 4, 8)
MOST_CONTEXT = 600_000  # tokens of all sequences
NOTHING = Engine(dict.fromkeys(DEGREES, 0.0), 1.0)
PRECISIONS = {"bf16": "bfloat16", "fp8": "fp8"}


Features = tuple[float, float, float]
Sample = tuple[Features, float]
PrefillMs = Callable[[int], float]  # of a prompt of so many tokens
DecodeMs = Callable[[int, int], float]  # of a step of so many sequences, so much context each


class Grid(NamedTuple):
    """Sizes of the passes that terms are fitted to, or judged by."""

    prompts: tuple[int, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]


GRID = Grid(
    (256, 512, 1024, 2048, 4096, 8192), (1, 4, 8, 16, 32, 64, 128, 256), (256, 1024, 4096, 16384)
)


class Decode(NamedTuple):
    """Milliseconds = a + b * context tokens + c * sequences, below LARGE_SEQS of these and from
    there on."""

    small: Features
    large: Features

    def of(self, num_seqs: int) -> Features:
        return self.large if num_seqs >= LARGE_SEQS else self.small


class Terms(NamedTuple):
    """Milliseconds: prefill = a + b * tokens + c * tokens^2. `error`: the largest relative one, of
    either."""

    prefill: Features
    decode: Decode
    error: float

    @property
    def line(self) -> str:
        """As nodeserve/policy has them."""
        parts = (self.prefill, *self.decode)
        numbers = (f"({', '.join(f'{term:.4g}' for term in part)})" for part in parts)
        return f"Fit({', '.join(numbers)})"


class Point(NamedTuple):
    """One measured run of as many clients as `concurrency`, times in milliseconds."""

    tp: int
    prompt: int
    output: int
    concurrency: int
    ttft_ms: float
    tpot_ms: float


def measured(system: str, model_path: str, precision: str, backend: str = "vllm") -> list[Point]:
    """Of one model, both phases on the same GPUs."""
    wanted = (system, model_path, backend, precision, "agg")
    names = ("system", "model_path", "backend", "precision", "mode")
    return [
        Point(
            int(row["tp_size"]),
            int(row["isl"]),
            int(row["osl"]),
            int(row["concurrency"]),
            float(row["silicon_ttft_ms"]),
            float(row["silicon_tpot_ms"]),
        )
        for row in rows("aic_measured_ttft_tpot")
        if tuple(row[name] for name in names) == wanted and row["concurrency"]
    ]


@cache
def engine() -> Engine:
    """From 70B on H100: what steps take beyond their kernels at 4 and 8 clients, and by how much
    more than kernels say the first token of 8192 tokens is later than that of 1024."""
    model, path = MODELS["llama-3.1-70b"], "meta-llama/Llama-3.1-70B"
    points = measured("h100_sxm", path, "fp8")
    other_us, factors = {1: 0.0}, []
    for tp in DEGREES[1:]:
        mine = [point for point in points if point.tp == tp]
        rest = [
            point.tpot_ms - _expected_tpot_ms(model, point)
            for point in mine
            if point.prompt == 1024 and point.concurrency <= 8
        ]
        other_us[tp] = max(0.0, 1e3 * median(rest) / model.layers)
        ttft = {
            point.prompt: point.ttft_ms
            for point in mine
            if point.concurrency == 4 and point.output == 1024
        }
        table = [
            prefill_ms("h100_sxm", "fp8", model, tp, length, NOTHING) for length in (8192, 1024)
        ]
        factors.append((ttft[8192] - ttft[1024]) / (table[0] - table[1]))
    return Engine(other_us, fmean(factors))


def front_ms() -> float:
    """What a first token takes beyond its pass, clients and server's front end: from the same runs
    at 4 clients, whose prompts seldom meet."""
    model, path = MODELS["llama-3.1-70b"], "meta-llama/Llama-3.1-70B"
    return median(
        point.ttft_ms - prefill_ms("h100_sxm", "fp8", model, point.tp, point.prompt, engine())
        for point in measured("h100_sxm", path, "fp8")
        if point.concurrency == 4 and point.prompt == 1024
    )


def fit(system: str, precision: str, model: Model, tp: int) -> Terms:
    """Of one shape; `precision` is that of the weights."""
    dtype, adds = PRECISIONS[precision], engine()
    return fitted(
        GRID,
        lambda length: prefill_ms(system, dtype, model, tp, length, adds),
        lambda num_seqs, context: decode_ms(system, dtype, model, tp, num_seqs, context, adds),
    )


def fitted(grid: Grid, prefill: PrefillMs, decode: DecodeMs) -> Terms:
    """Terms that come nearest to these times."""
    prefills, decodes = points_of(grid, prefill, decode)
    terms = _nearest(prefills)
    small = [one for one in decodes if one[0][2] < LARGE_SEQS]
    steps = Decode(_nearest(small), _nearest(decodes[len(small) :]))
    errors = errors_of(terms, prefills) + decode_errors(steps, decodes)
    return Terms(terms, steps, max(errors))


def _nearest(points: Sequence[Sample]) -> Features:
    first, second, third = nonnegative_fit([one for one, _ in points], [ms for _, ms in points])
    return first, second, third


def points_of(
    grid: Grid, prefill: PrefillMs, decode: DecodeMs
) -> tuple[list[Sample], list[Sample]]:
    """What the terms are multiplied by, and the milliseconds: of prefills, and of decodes."""
    prefills = [
        ((1.0, float(length), float(length) ** 2), prefill(length)) for length in grid.prompts
    ]
    decodes = [
        ((1.0, float(num_seqs * context), float(num_seqs)), decode(num_seqs, context))
        for num_seqs in grid.batches
        for context in grid.contexts
        if num_seqs * context <= MOST_CONTEXT
    ]
    return prefills, decodes


def errors_of(terms: Features, points: Sequence[Sample]) -> list[float]:
    """Relative ones, without their signs."""
    return [abs(sum(map(float.__mul__, terms, one)) / ms - 1) for one, ms in points]


def decode_errors(terms: Decode, points: Sequence[Sample]) -> list[float]:
    """The same, of decodes."""
    return [error for one in points for error in errors_of(terms.of(round(one[0][2])), [one])]


def _expected_tpot_ms(model: Model, point: Point) -> float:
    """Of clients out of step: each step's own time, and each prefill once in everybody's answer."""
    context = point.prompt + point.output // 2
    args = ("h100_sxm", "fp8", model, point.tp)
    step = decode_ms(*args, point.concurrency, context, NOTHING)
    return step + point.concurrency * prefill_ms(*args, point.prompt, NOTHING) / point.output


def _all() -> Iterator[tuple[str, int, Terms]]:
    for name, model in MODELS.items():
        precision = "fp8" if name == "llama-3.1-70b" else "bf16"
        for gpu in ("h100", "h200"):
            for tp in DEGREES:
                yield (
                    f"{name}-{precision}-{gpu}",
                    tp,
                    fit(f"{gpu}_sxm", precision, model, tp),
                )


def main() -> None:
    if (path := missing()) is not None:
        print(f"skipped: {path} is not here: set NODESERVE_DATA")
        return
    print(f"{engine()}, first tokens {front_ms():.1f} ms later than their passes")
    for name, tp, terms in _all():
        print(f"{name:24} {tp}: {terms.line},  # {terms.error:.0%}")


if __name__ == "__main__":
    main()
