"""Texts of exact length, as a real tokenizer and its chat template count them."""

import pytest

from nodeserve.checkpoint import resolve
from nodeserve.loadgen.prompts import chat_counter, text_counter, text_prompt
from nodeserve.loadgen.records import Job
from nodeserve.plan.records import Arrival
from nodeserve.text import Tokenizer
from tests.reference.embedded import needs_embedded_model


@needs_embedded_model
@pytest.mark.parametrize("num_tokens", [31, 40, 333, 4000])
def test_texts_are_exact(num_tokens: int) -> None:
    tokenizer = Tokenizer.load(resolve().path)
    for count in (chat_counter(tokenizer), text_counter(tokenizer)):
        for number in range(4):
            job = Job(number, Arrival(0.0, num_tokens, 1))
            assert count(text_prompt(job, 7, count)) == num_tokens
