"""Whether a worker still gets on: its loop turns, and with work at hand its steps end.

A worker is hung when nothing was seen of it for its limit: no turn of its loop, whatever it has to
do (it counts them in shared memory, also when idle), or no record of work done while it has work.
The limit is far above what its steps take, for whoever is past it is killed.

Time counts only while somebody looked: a node that was suspended whole, or a coordinator that was
held up, finds its workers as it left them. So `look` is told the seconds since the last look, and
its caller bounds them.
"""

FIRST_LIMIT_S = 300.0  # before any step has shown how long they take
LEAST_LIMIT_S = 30.0
SLACK = 10.0  # times the longest step that there may be


class Watchdog:
    """One worker's life. `timeout_s`: the limit; None: from what its steps take."""

    def __init__(self, timeout_s: float | None = None) -> None:
        self.silent_s = 0.0  # since a turn of its loop was last seen
        self.stuck_s = 0.0  # with work, since some of it was last done
        self.last_step_s = 0.0
        self._timeout_s = timeout_s
        self._beats = -1
        self._largest_tokens = 0  # of the largest step so far
        self._largest_s = 0.0
        self._longest_s = 0.0

    def stepped(self, num_tokens: int, seconds: float) -> None:
        """A step of so many tokens is over."""
        self.stuck_s = 0.0
        self.last_step_s = seconds
        self._longest_s = max(self._longest_s, seconds)
        if num_tokens > self._largest_tokens:
            self._largest_tokens, self._largest_s = num_tokens, seconds
        elif num_tokens == self._largest_tokens:
            self._largest_s = max(self._largest_s, seconds)

    def progressed(self) -> None:
        """It answered something else that it was asked to do."""
        self.stuck_s = 0.0

    def limit_s(self, most_tokens: int) -> float:
        """Seconds that are too many. `most_tokens`: of a full step.

        Small steps say little about large ones, so the largest one's rate counts, and never more
        than FIRST_LIMIT_S follows from it.
        """
        if self._timeout_s is not None:
            return self._timeout_s
        if not self._largest_tokens:
            return FIRST_LIMIT_S
        full_s = self._largest_s * max(1.0, most_tokens / self._largest_tokens)
        return max(LEAST_LIMIT_S, SLACK * self._longest_s, min(SLACK * full_s, FIRST_LIMIT_S))

    def look(self, beats: int, busy: bool, elapsed_s: float, most_tokens: int) -> str | None:
        """What is wrong with it, in words; None: nothing.

        beats: turns of its loop so far; busy: it has work that it can do; elapsed_s: since the last
        look.
        """
        self.silent_s = 0.0 if beats != self._beats else self.silent_s + elapsed_s
        self.stuck_s = self.stuck_s + elapsed_s if busy else 0.0
        self._beats = beats
        limit_s = self.limit_s(most_tokens)
        if max(self.silent_s, self.stuck_s) <= limit_s:
            return None
        if self.silent_s > limit_s / 2:  # who stands still also gets nothing done
            return f"hung: its loop has not turned for {self.silent_s:.1f} s"
        return f"hung: it has work and has done none for {self.stuck_s:.1f} s"
