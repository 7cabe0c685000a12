"""What may happen a thousand times a second, as one line of the log a second at most."""

import logging
from collections import Counter

from nodeserve.coordinator.request import Request
from nodeserve.errors import InvalidRequest, NodeServeError, PromptTooLong
from nodeserve.log import about, logger

OF_CLIENTS = {InvalidRequest.code, PromptTooLong.code}  # nobody who runs a node can help it


class Tally:
    """Counts between two lines. `tell` is called once a second, and when the node has stopped."""

    def __init__(self) -> None:
        self._refused: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._turned_away: Counter[str] = Counter()

    def refused(self, code: str) -> None:
        """A request that was never accepted."""
        self._refused[code] += 1

    def turned_away(self, error: NodeServeError) -> None:
        """A connection that is not served."""
        self._turned_away[str(error)] += 1

    def ended(self, request: Request, reason: str, code: str | None) -> None:
        """A request that was accepted."""
        if reason == "error":
            self._failed[str(code)] += 1
        if logger.isEnabledFor(logging.DEBUG):
            facts = {"request": request.request_id, "reason": code or reason, **request.usage()}
            logger.debug(
                "request %d ended: %s, %d tokens in, %d out",
                *facts.values(),
                extra=about("request_ended", **facts),
            )

    def tell(self) -> None:
        """A line for each kind of which there was one."""
        clients = not self._refused.keys() - OF_CLIENTS
        self._line(
            self._refused, "refused", "request", logging.INFO if clients else logging.WARNING
        )
        self._line(self._failed, "failed", "request", logging.WARNING)
        self._line(self._turned_away, "turned away", "connection", logging.WARNING)

    def _line(self, counts: "Counter[str]", verb: str, noun: str, level: int) -> None:
        if not counts:
            return
        total, kinds = counts.total(), dict(counts.most_common())
        counts.clear()
        why = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        event = f"{noun}s_{verb.replace(' ', '_')}"
        extra = about(event, count=total, kinds=kinds)
        logger.log(level, "%s %d %s: %s", verb, total, noun + "s" * (total != 1), why, extra=extra)
