"""What a constrained answer costs the worker that writes it, and whoever shares its steps.

    python -m bench.constraints [--smoke]

With the vocabulary of the embedded model (49,152 tokens):

    vocabulary  what the first constrained request of a worker's life waits for: reading the
                tokenizer, and llguidance's tree of all tokens
    compile     a constraint that was not seen before
    mask        which tokens may come next, for each token of random answers: p50, p99, worst
    forbid      those bits in the logits of 1, 16 and 64 rows; the floor is a plain fill of as many
    follow      making a matcher again from so many tokens, after a preemption or a handoff

and what constraints that are meant to take long are allowed to take. One thread, as in a worker.
"""

import argparse
import random
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.report import emit, percentile
from nodeserve.checkpoint import resolve
from nodeserve.errors import InvalidRequest
from nodeserve.text.constraints import Compiler, constraint_of
from nodeserve.types import Constraint
from nodeserve.worker.constraints import forbid

ROWS = (1, 16, 64)
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
USUAL = {
    "object": constraint_of({"json_object": True}),
    "person": constraint_of({"json_schema": PERSON}),
    "40 persons": constraint_of(
        {
            "json_schema": {
                "type": "object",
                "properties": {f"person{i}": PERSON for i in range(40)},
                "required": [f"person{i}" for i in range(40)],
            }
        }
    ),
    "words": constraint_of({"regex": r"([A-Z][a-z]+ ){3,20}[A-Z][a-z]+\."}),
    "choice": constraint_of({"choice": [f"answer number {i}" for i in range(100)]}),
}
EVIL = {
    "nested repetitions": Constraint("regex", "((a{1,100}){1,100}){1,100}"),
    "a long way back": Constraint("regex", ".*a.{3000}"),
    "many ways back": Constraint("regex", "(.*a){40}(.*b){40}.{500}"),
    "4000 names": constraint_of({"json_schema": {"enum": [f"value{i}" for i in range(4000)]}}),
    "4000 properties": constraint_of(
        {"json_schema": {"properties": {f"p{i}": {} for i in range(4000)}}}
    ),
}


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came of it."""
    began_s = time.perf_counter()
    found = work()
    return time.perf_counter() - began_s, found


def ids_of(bits: bytes) -> list[int]:
    return [
        8 * at + bit for at, byte in enumerate(bits) if byte for bit in range(8) if byte >> bit & 1
    ]


def walk(
    compiler: Compiler, constraint: Constraint, rng: random.Random, stops: set[int], most: int
) -> tuple[list[float], list[int], str]:
    """Seconds for each mask of a random answer, its tokens, and what ended it early."""
    matcher, times, answer = compiler.matcher(constraint), list[float](), list[int]()
    while len(answer) < most:
        matcher.consume(answer[-1:])
        seconds, bits = timed(matcher.allowed)
        times.append(seconds)
        if matcher.problem:
            return times, answer, matcher.problem
        ids = [token for token in ids_of(bits) if token not in stops]
        if not ids:
            break
        answer.append(rng.choice(ids))
    return times, answer, ""


def usual(compiler: Compiler, stops: set[int], num_walks: int, most: int) -> list[dict[str, Any]]:
    rows, rng = list[dict[str, Any]](), random.Random(1)
    for name, constraint in USUAL.items():
        compile_s, _ = timed(partial(compiler.matcher, constraint))
        walks = [walk(compiler, constraint, rng, stops, most) for _ in range(num_walks)]
        assert not any(problem for _, _, problem in walks), walks
        times = [seconds for one, _, _ in walks for seconds in one]
        longest = max((answer for _, answer, _ in walks), key=len)
        follow_s, _ = timed(partial(follow, compiler, constraint, longest))
        numbers: dict[str, float] = {
            "compile_ms": 1e3 * compile_s,
            "mask_p50_us": 1e6 * percentile(times, 0.5),
            "mask_p99_us": 1e6 * percentile(times, 0.99),
            "mask_worst_us": 1e6 * max(times),
            "follow_us_per_token": 1e6 * follow_s / len(longest),
            "num_masks": len(times),
        }
        rows.append({"constraint": name, **numbers})
        print(f"  {name:12}", *(f"{key} {value:.1f}" for key, value in numbers.items()))
    return rows


def evil(compiler: Compiler, stops: set[int], most: int) -> list[dict[str, Any]]:
    rows = []
    for name, constraint in EVIL.items():
        worst_s, ended = 0.0, ""
        try:
            compile_s, _ = timed(partial(compiler.matcher, constraint))
            times, _, ended = walk(compiler, constraint, random.Random(1), stops, most)
            worst_s = max(times)
        except InvalidRequest as problem:
            compile_s, _ = timed(partial(refusal, compiler, constraint))
            ended = str(problem)
        row = {"constraint": name, "compile_ms": 1e3 * compile_s, "mask_worst_ms": 1e3 * worst_s}
        rows.append({**row, "refused": ended[:100]})
        took = f"compile {1e3 * compile_s:.1f} ms, mask {1e3 * worst_s:.1f} ms"
        print(f"  {name:18} {took} {ended[:60]}")
    return rows


def follow(compiler: Compiler, constraint: Constraint, answer: list[int]) -> None:
    compiler.matcher(constraint).consume(answer)


def refusal(compiler: Compiler, constraint: Constraint) -> None:
    try:
        compiler.matcher(constraint)
    except InvalidRequest:
        return


def forbidding(compiler: Compiler, vocab_size: int, repeats: int) -> list[dict[str, Any]]:
    bits = compiler.matcher(USUAL["person"]).allowed()
    rows = []
    for count in ROWS:
        logits, where = torch.randn(count, vocab_size), list(range(count))
        fill = partial(logits.fill_, -torch.inf)
        mask = partial(forbid, logits, where, bits * count)
        fill_s, mask_s = (min(timed(work)[0] for _ in range(repeats)) for work in (fill, mask))
        rows.append({"rows": count, "floor_us": 1e6 * fill_s, "forbid_us": 1e6 * mask_s})
        print(f"  {count:3} rows: floor {1e6 * fill_s:.0f} us, forbid {1e6 * mask_s:.0f} us")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="What constrained answers cost a worker.")
    parser.add_argument("--smoke", action="store_true", help="a few tokens: does it run at all")
    smoke = parser.parse_args().smoke
    torch.set_num_threads(1)
    found = resolve()
    config, stops = found.config, set(found.config.eos_token_ids)
    load_s, compiler = timed(lambda: Compiler.load(str(found.path), config.vocab_size, stops))
    print(f"vocabulary of {config.vocab_size}: {1e3 * load_s:.0f} ms, once in a worker's life")
    emit(
        {
            "benchmark": "constraints",
            "vocab_size": config.vocab_size,
            "vocabulary_ms": 1e3 * load_s,
            "usual": usual(compiler, stops, 1 if smoke else 10, 20 if smoke else 200),
            "forbid": forbidding(compiler, config.vocab_size, 3 if smoke else 50),
            "evil": evil(compiler, stops, 5 if smoke else 50),
        }
    )


if __name__ == "__main__":
    main()
