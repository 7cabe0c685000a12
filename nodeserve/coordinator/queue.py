"""Requests that wait: highest priority first, then the earliest arrival."""

import heapq

from nodeserve.coordinator.request import Request

MAX_STALE = 64  # entries of removed requests that are kept, beyond as many as really wait


class WaitingQueue:
    """A heap with lazy removal: every operation is O(log n) amortised."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, int, Request]] = []
        self._here: set[int] = set()  # request ids that really wait
        self._pushes = 0

    def __len__(self) -> int:
        return len(self._here)

    def push(self, request: Request) -> None:
        assert request.request_id not in self._here
        self._here.add(request.request_id)
        # Request ids rise with arrival, so a request that is put back keeps its place in line.
        self._pushes += 1
        entry = (-request.priority, request.request_id, self._pushes, request)
        heapq.heappush(self._heap, entry)

    def first(self) -> Request:
        """The next request; it stays in the queue."""
        while self._heap[0][1] not in self._here:
            heapq.heappop(self._heap)
        return self._heap[0][3]

    def pop(self) -> Request:
        request = self.first()
        heapq.heappop(self._heap)
        self._here.discard(request.request_id)
        return request

    def remove(self, request: Request) -> None:
        """Take a request out if it waits here."""
        self._here.discard(request.request_id)
        if len(self._heap) > 2 * len(self._here) + MAX_STALE:
            self._heap = [entry for entry in self._heap if entry[1] in self._here]
            heapq.heapify(self._heap)
