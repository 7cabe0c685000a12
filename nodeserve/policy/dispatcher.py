"""From the buffer to the prefill instances: when a batch departs, to whom, with what.

The live coordinator and the simulator drive the same object: they tell it what happened and at what
time, and carry out what `decide` returns. It has no clock and does no I/O.
"""

from collections.abc import Sequence

from nodeserve.policy.units import Decision, Departure, DispatchOptions, PassDone, Unit, Waiting


class Dispatcher:
    """Owns the buffer. `instances` are lists of their units, in the order of their indices."""

    def __init__(self, instances: Sequence[Sequence[Unit]], options: DispatchOptions) -> None:
        self.instances = [list(units) for units in instances]
        self.options = options
        self._buffer: dict[int, Waiting] = {}
        self._lost: set[int] = set()

    def __len__(self) -> int:
        return len(self._buffer)

    @property
    def num_tokens(self) -> int:
        """Prompt tokens in the buffer."""
        return sum(waiting.num_tokens for waiting in self._buffer.values())

    def push(self, waiting: Waiting, now_s: float) -> None:
        """A request arrives, or comes back (its `arrived_s` is the first arrival)."""
        self._buffer[waiting.request_id] = waiting

    def remove(self, request_id: int) -> bool:
        """Take a request out, wherever it stands; False if it does not wait here."""
        return self._buffer.pop(request_id, None) is not None

    def on_pass(self, unit: int, done: PassDone, now_s: float) -> None:
        """A rank's pass ended; its account has the report."""

    def heard(self, instance: int, now_s: float) -> None:
        """A suspect answered a probe: it lives."""

    def lose(self, instance: int) -> None:
        """An instance is gone; what it held is pushed again by the caller."""
        self._lost.add(instance)

    def join(self, instance: int) -> None:
        """An instance is back, empty."""
        self._lost.discard(instance)

    def predict_wait_s(self, waiting: Waiting, now_s: float) -> float | None:
        """Time to first token that this request can expect from now on, or None before any pass
        was seen."""
        return None

    def decide(self, now_s: float) -> Decision:
        """What departs now; call it after every event and at the `wake_s` of the last answer."""
        departures = []
        for number, units in enumerate(self.instances):
            boarded = []
            if number not in self._lost:
                for waiting in list(self._buffer.values()):
                    unit = min(units, key=lambda unit: unit.account.outstanding_tokens)
                    account = unit.account
                    if account.outstanding_tokens or account.free_blocks < waiting.num_blocks:
                        continue
                    account.send(waiting.num_tokens, waiting.num_blocks)
                    boarded.append((self._buffer.pop(waiting.request_id), unit.index))
            if boarded:
                departures.append(Departure(number, boarded))
        return Decision(departures, [], None)
