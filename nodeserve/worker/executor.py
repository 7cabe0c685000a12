"""Computes a batch with the real model, at once: for devices that are the processor itself."""

from array import array
from collections.abc import Callable
from typing import Any

from nodeserve.model.families import Model
from nodeserve.policy.batching import Batch, Sequence, Work
from nodeserve.types import Sampling
from nodeserve.worker.constraints import Constraints
from nodeserve.worker.contract import Computed, Sampled
from nodeserve.worker.inputs import Staging
from nodeserve.worker.sampler import sample

WARM_UP_TOKENS = 16


class ModelExecutor:
    """A model, its pages, and the staging buffers between the scheduler and both."""

    def __init__(
        self, model: Model, cache: Any, staging: Staging, constraints: Constraints | None = None
    ) -> None:
        self._model = model
        self._cache = cache
        self._staging = staging
        self._constraints = constraints

    @property
    def overlaps(self) -> bool:
        return False

    def called(self, departure: int) -> bool:
        return False  # no other rank waits for this one

    def on_done(self, wake: Callable[[], None]) -> None:
        """Every step ends in its launch: nobody waits."""

    def launch(self, batch: Batch) -> Computed:
        logits = self._model.forward(self._staging.build(batch), self._cache)
        if not len(logits):
            return Computed(Sampled([], None))
        return Computed(sample(logits, batch.sampled, self._constraints))

    def warm_up(self) -> None:
        """A prefill and a decode on the first block, which belongs to nobody yet."""
        token_ids = array("i", [0] * (WARM_UP_TOKENS - 1))
        sequence = Sequence(-1, token_ids, len(token_ids), Sampling(temperature=0.0))
        sequence.block_ids.append(0)
        self.launch(Batch([Work(sequence, 0, len(token_ids), True)], 0, len(token_ids)))
        sequence.token_ids.append(0)
        self.launch(Batch([Work(sequence, len(token_ids) - 1, 1, True)], 1, 0))
