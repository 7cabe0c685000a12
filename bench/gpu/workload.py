"""The load that our step loop and transformers' continuous batching both get."""

import random
from dataclasses import dataclass

from bench.gpu.bed import Bed

SEED = 11


@dataclass(frozen=True, slots=True)
class Load:
    """All requests at once, each written to its full length."""

    num_requests: int
    num_prompt: int  # tokens
    num_output: int

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """The same for everybody; no two share a beginning that could be computed once."""
        draw = random.Random(SEED)
        return [
            [draw.randrange(1, vocab_size) for _ in range(self.num_prompt)]
            for _ in range(self.num_requests)
        ]


def load_for(bed: Bed) -> Load:
    return Load(256, 512, 128) if not bed.rehearsal else Load(3, 12, 4)
