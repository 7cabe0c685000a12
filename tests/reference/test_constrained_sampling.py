"""Constraints in the sampler: what may not come is never chosen, all else is as without them."""

import math
import tempfile
import threading
from array import array
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from nodeserve.errors import ModelError
from nodeserve.policy.batching import Sequence
from nodeserve.text import Tokenizer
from nodeserve.text.constraints import Compiler
from nodeserve.types import Constraint, Sampling
from nodeserve.worker.constraints import Constraints, forbid, unpacked
from nodeserve.worker.sampler import sample
from tests.fakes.gguf_writer import gpt2_metadata, write_gguf
from tests.fakes.harness import default_spec
from tests.reference.gpu.plain import config_of
from tests.reference.test_sampler import random_logits, sequence_of

VOCAB = 700  # above the tokenizer's, and in the sampler's chunks it leaves a rest
EOS = 262
PROMPT = [3, 5, 8]
DIGITS = Constraint("regex", "[0-9]{2,4}")
FAILS = 5  # the row of `constrained_requests` that cannot go on


@cache
def compiler_of(vocab_size: int) -> Compiler:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Tokenizer.load(write_gguf(Path(folder) / "model.gguf", gpt2_metadata()))
    return Compiler(tokenizer, vocab_size, [EOS])


def constraints() -> Constraints:
    return Constraints(lambda: compiler_of(VOCAB))


def constrained(output: bytes, constraint: Constraint, **sampling: Any) -> Sequence:
    values = Sampling(constraint=constraint, **{"temperature": 0.0, **sampling})
    return Sequence(0, array("i", [*PROMPT, *output]), len(PROMPT), values)


def digits() -> Sequence:
    return constrained(b"", DIGITS)


def constrained_requests() -> list[Sequence]:
    """Eight, with and without a constraint, greedy and drawn, and one whose output is not what its
    constraint allows."""
    return [
        constrained(b"", DIGITS),
        sequence_of(seed=1),
        constrained(b"12", DIGITS, temperature=1.0, seed=3, logprobs=2),
        constrained(b"1234", DIGITS, temperature=5.0, seed=4),
        constrained(b"{", Constraint("json_schema", '{"type":"object"}'), temperature=1.0, seed=5),
        constrained(b"x", DIGITS),
        sequence_of(temperature=0.0),
        constrained(b"", Constraint("regex", "(a|b)+"), temperature=9.0, seed=1, top_k=50),
    ]


def test_only_allowed_tokens_are_chosen_and_others_choose_as_before() -> None:
    logits = random_logits(8, seed=2, vocab=VOCAB)
    sampled = sample(logits.clone(), constrained_requests(), constraints())
    tokens = sampled.token_ids
    assert tokens[0] in b"0123456789" and tokens[2] in (*b"0123456789", EOS)
    assert tokens[3] == EOS and tokens[7] in b"ab"
    rows = [
        row for row, one in enumerate(constrained_requests()) if one.sampling.constraint is None
    ]
    free = [constrained_requests()[row] for row in rows]
    assert [tokens[row] for row in rows] == sample(logits[rows].clone(), free).token_ids
    (failed,) = sampled.failed
    assert failed.row == FAILS and "after 1 tokens" in str(failed.problem)


def test_the_most_likely_allowed_token_is_the_greedy_choice() -> None:
    logits = random_logits(1, seed=3, vocab=VOCAB)
    digits = torch.tensor(list(b"0123456789"))
    best = int(digits[logits[0, digits].argmax()])
    assert sample(logits, [constrained(b"", DIGITS)], constraints()).token_ids == [best]


def test_a_draw_has_the_probabilities_of_the_allowed_alone() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, ord("a")] = math.log(3)
    counts = {ord("a"): 0, ord("b"): 0}
    for seed in range(400):
        one = constrained(b"", Constraint("regex", "a|b"), temperature=1.0, seed=seed)
        counts[sample(logits.clone(), [one], constraints()).token_ids[0]] += 1
    assert 270 < counts[ord("a")] < 330, "3 of 4"


def test_log_probabilities_are_those_of_the_raw_logits() -> None:
    logits = random_logits(1, seed=4, vocab=VOCAB)
    one = constrained(b"", DIGITS, logprobs=0)
    expected = torch.log_softmax(logits, -1)[0]
    sampled = sample(logits, [one], constraints())
    assert sampled.logprobs is not None
    assert sampled.logprobs[0].logprob == pytest.approx(float(expected[sampled.token_ids[0]]))


def test_a_sequence_that_comes_back_goes_on_as_if_it_had_stayed() -> None:
    """After a preemption, a handoff, a restart: the follower is made from the tokens."""
    schema = Constraint("json_schema", '{"type":"array","items":{"type":"integer"},"maxItems":9}')
    stays = constrained(b"", schema, temperature=1.0, seed=8)
    for step in range(12):
        comes_back = constrained(b"", schema, temperature=1.0, seed=8)
        comes_back.token_ids = stays.token_ids[:]
        logits = random_logits(1, seed=step, vocab=VOCAB)
        (token,) = sample(logits.clone(), [stays], constraints()).token_ids
        assert sample(logits, [comes_back], constraints()).token_ids == [token]
        if token == EOS:
            break
        stays.token_ids.append(token)
    output = bytes(stays.token_ids[len(PROMPT) :])
    assert len(output) > 2 and output.count(b"[") == 1, "and it is one list"


def test_what_cannot_be_loaded_or_compiled_fails_the_request_and_no_other() -> None:
    def load() -> Compiler:
        raise ModelError("no tokenizer there")

    logits = random_logits(2, seed=2, vocab=VOCAB)
    requests = [constrained(b"", DIGITS), sequence_of(temperature=0.0)]
    sampled = sample(logits.clone(), requests, Constraints(load))
    assert [(one.row, str(one.problem)) for one in sampled.failed] == [(0, "no tokenizer there")]
    assert sampled.token_ids[1] == int(logits[1].argmax())
    bad = constrained(b"", Constraint("regex", "("))
    (failed,) = sample(logits[:1].clone(), [bad], constraints()).failed
    assert "unclosed group" in str(failed.problem)


def test_what_is_loaded_ahead_is_loaded_once_and_in_another_thread() -> None:
    """A step waits for what is left of it, and no other does anything for it."""
    threads: list[str] = []
    may_load = threading.Event()

    def load() -> Compiler:
        threads.append(threading.current_thread().name)
        may_load.wait()
        return compiler_of(VOCAB)

    found = Constraints(load)
    found.load_ahead()
    sample(random_logits(1, vocab=VOCAB), [sequence_of()], found)  # for ever, if it waited
    may_load.set()
    for seed in range(2):
        (token,) = sample(random_logits(1, seed=seed, vocab=VOCAB), [digits()], found).token_ids
        assert chr(token).isdigit()
    assert threads == ["vocabulary"]


def test_a_models_vocabulary_is_begun_before_anybody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Event()

    def load(location: str, vocab_size: int, eos_token_ids: object) -> Compiler:
        assert (location, vocab_size) == ("there", VOCAB)
        begun.set()
        return compiler_of(VOCAB)

    monkeypatch.setattr(Compiler, "load", load)
    config = config_of(vocab_size=VOCAB, eos_token_ids=(EOS,))
    assert Constraints.of_worker(default_spec(model="there", rank=1, pp=2), config) is None
    assert not begun.is_set(), "a follower has no use for it"
    found = Constraints.of_worker(default_spec(model="there"), config)
    begun.wait()
    assert sample(random_logits(1, vocab=VOCAB), [digits()], found).token_ids


def test_what_cannot_be_loaded_ahead_is_for_the_first_request_to_say() -> None:
    def load() -> Compiler:
        raise ModelError("no tokenizer there")

    found = Constraints(load)
    found.load_ahead()
    (failed,) = sample(random_logits(1, vocab=VOCAB), [digits()], found).failed
    assert str(failed.problem) == "no tokenizer there"


def test_nothing_is_loaded_for_those_without() -> None:
    def load() -> Compiler:
        raise AssertionError("nobody asked")

    sample(random_logits(2, vocab=VOCAB), [sequence_of(), sequence_of()], Constraints(load))


@pytest.mark.parametrize("width", [8, 61, 64, 700])
def test_bits_become_a_mask_of_their_rows(width: int) -> None:
    allowed = torch.rand(2, width, generator=torch.Generator().manual_seed(width)) < 0.3
    bits = [
        bytes(
            sum(int(flag) << at for at, flag in enumerate(row[start : start + 8]))
            for start in range(0, width, 8)
        )
        for row in allowed.tolist()
    ]
    before = torch.randn(3, width)
    logits = before.clone()
    forbid(logits, [2, 0], b"".join(bits))
    assert logits[1].equal(before[1])
    assert logits[[2, 0]][allowed].equal(before[[2, 0]][allowed]), "to the bit"
    assert (logits[[2, 0]][~allowed] < -1e38).all()
    packed = torch.frombuffer(bytearray(bits[0]), dtype=torch.uint8)
    assert unpacked(packed)[:width].bool().equal(allowed[0]), "as on a device"
