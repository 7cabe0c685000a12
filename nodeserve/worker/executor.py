"""Computes batches with the real model, for devices that are the processor itself.

With one stage a launch computes the whole step. With several it computes the first stage's part,
and the step is over when the last stage says that its rows are on their way here, where the leader
chooses tokens. Meanwhile the first stage works on other sequences' steps.
"""

from array import array
from collections import deque
from collections.abc import Callable
from typing import Any

from nodeserve.model.families import Model
from nodeserve.policy.batching import Batch, Sequence, Work
from nodeserve.policy.cost import rank_work
from nodeserve.types import Sampling
from nodeserve.worker.constraints import Constraints
from nodeserve.worker.contract import ALONE, Computed, Flight, Passing, Sampled, Team
from nodeserve.worker.inputs import Staging
from nodeserve.worker.plans import PlanReader, packed
from nodeserve.worker.ranks import NO_RANKS, Ranks
from nodeserve.worker.sampler import sample

WARM_UP_TOKENS = 16


class ModelExecutor:
    """A model, its pages, and the staging buffers between the scheduler and both; `ranks`: the
    other DP ranks that compute their passes together with ours."""

    def __init__(
        self,
        model: Model,
        cache: Any,
        staging: Staging,
        constraints: Constraints | None = None,
        team: Team = ALONE,
        num_stages: int = 1,
        ranks: Ranks = NO_RANKS,
    ) -> None:
        self.team = team
        self._model = model
        self._cache = cache
        self._staging = staging
        self._constraints = constraints
        self._num_stages = num_stages
        self._ranks = ranks

    @property
    def overlaps(self) -> bool:
        return False

    def opens_s(self) -> float:
        return self._ranks.opens_s()  # a launch has computed the first stage when it returns

    def called(self, departure: int) -> bool:
        return self._ranks.called(departure)

    def on_done(self, wake: Callable[[], None]) -> None:
        """A step ends in its launch, or a follower of the last stage rings our bell."""
        self._ranks.on_called(wake)

    def launch(self, batch: Batch) -> Flight:
        began = self._ranks.enter(rank_work(batch))
        inputs = self._staging.build(batch)
        number = self.team.step(lambda: packed(inputs))
        self._model.advance(inputs, self._cache)

        def choose() -> Flight:
            return Computed(self._sample(batch)._replace(ran=self._ranks.ran(began)))

        return Passing(self.team, number, choose) if self._num_stages > 1 else choose()

    def leave(self) -> bool:
        return self._ranks.leave()

    def _sample(self, batch: Batch) -> Sampled:
        sequences = batch.sampled
        logits = self._model.logits(len(sequences))
        if not sequences:
            return Sampled([], None)
        return sample(logits, sequences, self._constraints)

    def warm_up(self) -> None:
        """A prefill and a decode on the first block, which belongs to nobody yet. Followers have
        loaded: for them these are steps like others, until they hear what they were for."""
        token_ids = array("i", [0] * (WARM_UP_TOKENS - 1))
        sequence = Sequence(-1, token_ids, len(token_ids), Sampling(temperature=0.0))
        sequence.block_ids.append(0)
        self._run(Batch([Work(sequence, 0, len(token_ids), True)], 0, len(token_ids)))
        sequence.token_ids.append(0)
        self._run(Batch([Work(sequence, len(token_ids) - 1, 1, True)], 1, 0))
        self.team.warm()

    def _run(self, batch: Batch) -> None:
        flight = self.launch(batch)
        while not flight.done():
            self.team.wait()
        flight.result()


class ModelFollower:
    """A follower's part of the same steps. `has_results`: what the leader waits for, where there
    are several stages, comes from here."""

    def __init__(self, model: Model, cache: Any, num_stages: int, has_results: bool) -> None:
        self._model = model
        self._cache = cache
        self._num_stages = num_stages
        self._has_results = has_results
        self._reader = PlanReader()
        self._unchosen: deque[int] = deque()  # rows of the steps without tokens
        self._untold = 0  # steps whose results went to the leader's stage

    def follow(self, plan: bytes) -> None:
        inputs = self._reader.read(plan)
        self._model.advance(inputs, self._cache)
        self._unchosen.append(inputs.logit_rows.numel())
        if self._num_stages == 1:
            self.choose()
        elif self._has_results:
            self._untold += 1

    def num_passed(self) -> int:
        count, self._untold = self._untold, 0
        return count

    def choose(self) -> None:
        self._model.logits(self._unchosen.popleft())
