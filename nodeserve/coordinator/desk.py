"""Answers to questions about the node: who it is, what it does, how it is, whether it adds up."""

import os
import time
from collections.abc import Callable
from typing import Any

from nodeserve import __version__
from nodeserve.checkpoint import Checkpoint
from nodeserve.coordinator.audit import Auditor
from nodeserve.coordinator.coordinator import Coordinator
from nodeserve.coordinator.expert_survey import ExpertSurvey
from nodeserve.coordinator.health import Pulse, health_of, seat_of
from nodeserve.coordinator.placement import Plan
from nodeserve.coordinator.stats import node_stats
from nodeserve.coordinator.streams import Stream
from nodeserve.wire.messages import PROTOCOL_VERSION, Audit, Experts, Health, Hello, Stats

MIN_FRAME_LIMIT_BYTES = 4 << 20
MAX_BACKLOG_BYTES = 8 << 20


class Desk:
    """What connections ask that is not about a request. `on_stop(drain)` stops the node."""

    def __init__(
        self,
        plan: Plan,
        checkpoint: Checkpoint,
        coordinator: Coordinator,
        on_stop: Callable[[bool], None],
    ) -> None:
        self.pulse = Pulse(on_beat=coordinator.tally.tell)
        self._plan = plan
        self._checkpoint = checkpoint
        self._coordinator = coordinator
        self._on_stop = on_stop
        self._auditor = Auditor(coordinator)
        self.expert_survey = ExpertSurvey(coordinator.links, checkpoint.config)
        self._started_s = time.monotonic()

    @property
    def max_frame_bytes(self) -> int:
        return max(MIN_FRAME_LIMIT_BYTES, 8 * self._plan.max_model_len)

    def welcome(self) -> Hello:
        config, model = self._plan.config, self._checkpoint.config
        server = {
            "model": config.served_model_name,
            "tokenizer": str(self._checkpoint.path),
            "max_model_len": self._plan.max_model_len,
            "vocab_size": model.vocab_size,
            "eos_token_ids": list(model.eos_token_ids),
            "max_frame_bytes": self.max_frame_bytes,
            "max_backlog_bytes": MAX_BACKLOG_BYTES,
            "block_size": config.block_size,
            "layout": config.layout,
            "pid": os.getpid(),
            "version": __version__,
        }
        return Hello(PROTOCOL_VERSION, server)

    def stats(self) -> Stats:
        now_s = time.monotonic()
        config = self._plan.config
        return Stats(
            {
                "model": config.served_model_name,
                "layout": config.layout,
                "pid": os.getpid(),
                "uptime_s": now_s - self._started_s,
                "health": self._health(),
                **node_stats(self._coordinator, now_s),
            }
        )

    def health(self) -> Health:
        return Health(self._health())

    def audit(self, stream: Stream) -> None:
        """The answer follows when all workers have counted."""
        self._auditor.ask(lambda result: stream.send(Audit(result)))

    def experts(self, stream: Stream) -> None:
        """The answer follows when all ranks that share experts have counted."""
        self.expert_survey.ask(lambda result: stream.send(Experts(result)))

    def stop(self, drain: bool) -> None:
        self._on_stop(drain)

    def _health(self) -> dict[str, Any]:
        coordinator = self._coordinator
        instances = coordinator.dispatch.dispatcher.instances
        doubts = [
            f"instance {one.number} does not say that its pass is over"
            for one in instances
            if one.suspect and not one.lost
        ]
        seats = [seat_of(link) for link in coordinator.links]
        return health_of(seats, self.pulse.lag_s, coordinator.closes_s is not None, doubts)
