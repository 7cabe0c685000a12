"""Requests under which workers ended: they go on one at a time, so that it shows which was why.

When a worker ends all that it had are put back, and often run together again. Whoever was there
twice is a suspect, the reason and those that only were beside it. Were they to run together once
more, they would all be blamed alike. So one of them is on trial at a time, among requests that are
none: if a worker ends again it was this one, and when it has come through a prefill, its handoff
and a step of a decode at the place where it stood, it is a suspect no more.

Always true: a suspect waits here, is the one on trial, or is over.
"""

from nodeserve.policy.units import Waiting

SUSPECT_LOSSES = 2  # workers that ended under a request from which it is tried alone
MAX_LOSSES = 4  # that may end under it whatever came of its trials: fewer than take an instance out
TRIAL_TOKENS = 2  # a prefill gives one, a decode the other


class Suspects:
    """A line of them, by priority and then the earliest first: request ids rise with arrival."""

    def __init__(self) -> None:
        self.on_trial: int | None = None  # a request's id
        self._line: dict[int, Waiting] = {}

    def __len__(self) -> int:
        """Those that wait for their trial."""
        return len(self._line)

    def add(self, waiting: Waiting) -> None:
        """A suspect was put back; if it was on trial, that begins again."""
        self.remove(waiting.request_id)
        self._line[waiting.request_id] = waiting

    def remove(self, request_id: int) -> None:
        """It is over or acquitted; unknown ids are fine."""
        self._line.pop(request_id, None)
        if self.on_trial == request_id:
            self.on_trial = None

    def next(self) -> Waiting | None:
        """Who goes on now; None while another one is on trial, or where nobody waits."""
        if self.on_trial is not None or not self._line:
            return None
        first = min(self._line.values(), key=lambda one: (-one.priority, one.request_id))
        self.on_trial = first.request_id
        return self._line.pop(first.request_id)
