"""Prompts of exact length: random, the same for the same request of the same run.

Where a trace says that requests share blocks, their prompts begin with the same tokens, so a prefix
cache finds what it found in production. Every run has other tokens: what an earlier run left in a
cache is of no use.
"""

from collections.abc import Callable
from random import Random

import numpy as np

from nodeserve.errors import InvalidRequest
from nodeserve.loadgen.records import Job
from nodeserve.text import Tokenizer

VOCAB_SIZE = 8192  # ids below it that every large model has, for servers that do not say theirs
TEXT = (
    "time year people way day man thing woman life child world school state family student group"
    " country problem hand part place case week company system program question work number night"
    " point home water room mother area money story fact month lot right study book eye job word"
    " business issue side kind head house service friend father power hour game line end member"
)
WORDS = TEXT.split()
PIECES = ("time", "a", "I", "1", "!", ".")  # one of them is a single token more
FEW = 4  # missing tokens that are added one by one
MAX_ROUNDS = 32
CountTokens = Callable[[str], int]


def id_range(vocab_size: int) -> tuple[int, int]:
    """Ids of ordinary tokens: special ones are usually among the first or the last."""
    return vocab_size // 16, vocab_size - vocab_size // 16


def token_ids(
    job: Job, run: int, vocab_size: int, block_tokens: int
) -> "np.ndarray[tuple[int], np.dtype[np.int32]]":
    """[num_prompt_tokens] int32, of which the shared blocks have `block_tokens` each."""
    num_tokens = job.arrival.num_prompt_tokens
    low, high = id_range(vocab_size)
    parts: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
    missing = num_tokens
    for block_id in job.arrival.block_ids:
        if missing <= 0:
            break
        parts.append(np.random.default_rng([run, 1, block_id]).integers(low, high, block_tokens))
        missing -= block_tokens
    if missing > 0:
        parts.append(np.random.default_rng([run, 0, job.number]).integers(low, high, missing))
    return np.concatenate(parts)[:num_tokens].astype(np.int32)


def text_prompt(job: Job, run: int, count: CountTokens) -> str:
    """Words for which `count` gives the request's number of tokens, exactly.

    InvalidRequest where that cannot be, such as below what a chat template needs by itself.
    """
    wanted = job.arrival.num_prompt_tokens
    random = Random(f"{run} {job.number}")
    words = random.choices(WORDS, k=wanted)
    for _ in range(MAX_ROUNDS):
        text = " ".join(words)
        missing = wanted - count(text)
        if missing == 0:
            return text
        if missing < 0:
            del words[missing:]  # a word has one token at least, so this is enough
        elif missing <= FEW:
            fitting = (piece for piece in PIECES if count(f"{text} {piece}") <= wanted)
            if (piece := next(fitting, None)) is None:
                break
            words.append(piece)
        else:
            words += random.choices(WORDS, k=missing // 2)
    raise InvalidRequest(
        f"no text with exactly {wanted} tokens was found (with no words at all there are"
        f" {count('')}): use --api completions, which takes token ids, or longer prompts"
    )


def rough_text(job: Job, run: int) -> str:
    """A text of about so many tokens, where nobody knows how the server cuts it: one word each."""
    return " ".join(Random(f"{run} {job.number}").choices(WORDS, k=job.arrival.num_prompt_tokens))


def chat_counter(tokenizer: Tokenizer) -> CountTokens:
    """Tokens of a conversation of one message, as the model's template writes it."""

    def count(text: str) -> int:
        prompt = tokenizer.chat_prompt([{"role": "user", "content": text}])
        return len(tokenizer.encode(prompt, add_special=False))

    return count


def text_counter(tokenizer: Tokenizer) -> CountTokens:
    """Tokens of a prompt, with what the model wants around it."""
    return lambda text: len(tokenizer.encode(text))
