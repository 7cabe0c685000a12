"""Where a worker's rings are: lists in the test's hands."""

from nodeserve.wire.messages import FromWorker, ToWorker


class FakeLink:
    def __init__(self) -> None:
        self.inbox: list[ToWorker] = []
        self.said: list[FromWorker] = []
        self.waits: list[float] = []
        self.num_wakes = 0

    @property
    def num_sent(self) -> int:
        return len(self.said)

    def drain(self) -> list[ToWorker]:
        taken, self.inbox = self.inbox, []
        return taken

    def wait(self, timeout_s: float) -> None:
        self.waits.append(timeout_s)

    def wake(self) -> None:
        self.num_wakes += 1

    def put(self, message: FromWorker) -> None:
        self.said.append(message)

    def beat(self) -> None:
        pass
