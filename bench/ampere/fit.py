"""Fits the cost model's terms to the times of `kernels.py`, and says how far both are off.

    python -m bench.ampere.fit

prints the terms that nodeserve/policy/kernel_fits.py has for A100, their error at sizes that they
were not fitted to, and what they say of passes that were measured: Llama 2 70B on two, four and
eight A100 (Splitwise's medians, Mutinifni/splitwise-sim 8f99e7dc), of which nothing here is from.
That engine started each kernel by itself: on four GPUs or more none of its steps took less than
42 ms, however little was in it.
"""

from collections.abc import Iterator
from functools import cache
from statistics import fmean
from typing import NamedTuple

from bench.ampere.kernels import NAMES, decode_ms, missing, prefill_ms
from bench.hopper import kernels as hopper
from bench.hopper.fit import DEGREES, GRID, Grid, Terms, decode_errors, errors_of, fitted, points_of

# Between the sizes that are fitted to.
HELD_OUT = Grid((384, 768, 1536, 3072, 6144), (2, 8, 24, 48, 96, 192), (512, 2048, 8192))
MODEL, TABLE = "llama-3.1-70b", "splitwise_step_times"
LEAST_PROMPT, MOST_PROMPT = 512, 8192  # where starting kernels is not what prefills take


class Held(NamedTuple):
    """Relative errors at HELD_OUT: of prefills and of decodes, mean and largest."""

    prefill: tuple[float, float]
    decode: tuple[float, float]


class Measured(NamedTuple):
    """A prompt and the step after it, in milliseconds: what was measured, what the terms say."""

    tp: int
    prompt: int
    prefill_ms: tuple[float, float]
    decode_ms: tuple[float, float]


@cache
def fit(name: str, tp: int) -> Terms:
    """Of one shape; `name` is a key of NAMES."""
    model = hopper.MODELS[name]
    return fitted(
        GRID,
        lambda length: prefill_ms(name, model, tp, length),
        lambda num_seqs, context: decode_ms(name, model, tp, num_seqs, context),
    )


def held_out(name: str, tp: int) -> Held:
    """How far the terms are from the times at other sizes."""
    model, terms = hopper.MODELS[name], fit(name, tp)
    points = points_of(
        HELD_OUT,
        lambda length: prefill_ms(name, model, tp, length),
        lambda num_seqs, context: decode_ms(name, model, tp, num_seqs, context),
    )
    first, second = errors_of(terms.prefill, points[0]), decode_errors(terms.decode, points[1])
    return Held((fmean(first), max(first)), (fmean(second), max(second)))


def measured() -> Iterator[Measured]:
    """Single prompts of Llama 2 70B on A100, whose layers are those of 3.1."""
    for row in hopper.rows(TABLE):
        tp, prompt = int(row["tensor_parallel"]), int(row["prompt_size"])
        wanted = ("llama2-70b", "a100-80gb", "1", "128")
        names = ("model", "hardware", "batch_size", "token_size")
        if tuple(row[name] for name in names) != wanted:
            continue
        if not LEAST_PROMPT <= prompt <= MOST_PROMPT:
            continue
        prefill, decode, _ = fit(MODEL, tp)
        yield Measured(
            tp,
            prompt,
            (float(row["prompt_ms"]), _ms(prefill, prompt, prompt * prompt)),
            (float(row["token_ms"]), _ms(decode.of(1), prompt + 64, 1)),
        )


def _ms(terms: tuple[float, float, float], first: float, second: float) -> float:
    return terms[0] + terms[1] * first + terms[2] * second


def main() -> None:
    for path in (missing(), hopper.missing()):
        if path is not None:
            print(f"skipped: {path} is not here: set NODESERVE_DATA")
            return
    for name in NAMES:
        for tp in DEGREES:
            terms, held = fit(name, tp), held_out(name, tp)
            print(f"{name:14} {tp}: {terms.line},  # {terms.error:.0%}")
            said = [f"{mean:.1%}, {most:.0%} at most" for mean, most in held]
            print(f"{'':17} at sizes in between: prefill off by {said[0]}; decode {said[1]}")
    print("\nLlama 2 70B measured on A100\ntp prompt     prefill ms            decode ms")
    for one in measured():
        (first, ours), (second, theirs) = one.prefill_ms, one.decode_ms
        print(
            f"{one.tp:2} {one.prompt:6}  {first:7.1f} {ours:7.1f} {ours / first - 1:+4.0%}"
            f"    {second:6.1f} {theirs:6.1f} {theirs / second - 1:+4.0%}"
        )


if __name__ == "__main__":
    main()
