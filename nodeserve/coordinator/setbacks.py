"""What becomes of requests that lose their place: their worker, their pages, or room for them.

Always true: whoever goes back to the window keeps the tokens that its client has, and every worker
that lives and has pages of it is told that they are not needed. Pages whose worker is gone are
nobody's: then `source` is -1.
"""

from collections.abc import Callable, Sequence

from nodeserve.coordinator.dispatch import Dispatch
from nodeserve.coordinator.link import WorkerLink
from nodeserve.coordinator.request import Request
from nodeserve.coordinator.tracer import Tracer
from nodeserve.errors import HandoffFailed, NodeServeError, WorkerLost
from nodeserve.policy.lifecycle import Event, Phase
from nodeserve.policy.suspects import MAX_LOSSES, SUSPECT_LOSSES, TRIAL_TOKENS
from nodeserve.wire.messages import ReleaseKv

MAX_FAILED_HANDOFFS = 2  # of one request before it ends


class Setbacks:
    """`fail` ends a request for its client, with the error that says why."""

    def __init__(
        self,
        links: Sequence[WorkerLink],
        dispatch: Dispatch,
        tracer: Tracer,
        now: Callable[[], float],
        fail: Callable[[Request, NodeServeError], None],
    ) -> None:
        self._links = links
        self._dispatch = dispatch
        self._tracer = tracer
        self._now = now
        self._fail = fail

    def put_back(self, request: Request, why: str) -> None:
        """To the window, from wherever it was; `why` is for those who trace."""
        self._tracer.set_back(request, why)
        request.num_preemptions += 1
        request.holder = request.source = -1
        now_s = self._now()
        request.stamps.lose(now_s)
        self._dispatch.put_back(request, now_s)

    def park(self, request: Request) -> None:
        """Its pages are ready, perhaps again. If nobody is left who could pull them, whoever
        prefills it now decodes on as well."""
        if self._dispatch.anyone_pulls:
            request.stamps.parked = self._now()
            self._dispatch.park(request)
        else:
            self._start_over(request)

    def park_again(self, request: Request) -> None:
        """A pull did not happen: the pages still wait at their source, if that lives."""
        request.holder = request.source
        self._tracer.parked_again(request)
        if request.source >= 0:
            self.park(request)
        else:
            self._start_over(request)

    def redo(self, request: Request, words: str) -> None:
        """Its pages did not arrive. If that is their source's end, they are gone; if not, nobody
        can say what is wrong with them. Compute them again, but not for ever."""
        request.num_failed_handoffs += request.source >= 0
        if request.num_failed_handoffs > MAX_FAILED_HANDOFFS:
            self._fail(request, HandoffFailed(words))
        else:
            request.on(Event.KV_REFUSED)
            self._start_over(request)

    def lose(self, request: Request, link: WorkerLink) -> None:
        """A worker that may have something of it is gone."""
        if request.source == link.index and request.holder != link.index:
            request.source = -1  # its holder says whether the pages had arrived by then
        if request.holder == link.index and request.phase is not Phase.DRAINING:
            self._lose_holder(request)
        elif request.phase is Phase.PARKED and not self._dispatch.anyone_pulls:
            self._start_over(request)

    def release_source(self, request: Request) -> None:
        """Nobody reads its pages any more."""
        source, request.source = request.source, -1
        if source >= 0:
            self._links[source].send(ReleaseKv(request.request_id))

    def _lose_holder(self, request: Request) -> None:
        """Again from the window, or from its source; but not if it is why its worker ended."""
        if request.phase is not Phase.PARKED and self._is_to_blame(request):
            words = f"{request.num_losses} workers ended while they computed this request"
            self._fail(request, WorkerLost(words))
        elif request.phase is not Phase.MOVING:
            request.source = -1
            self._start_over(request)
        else:
            request.on(Event.KV_REFUSED)
            if request.is_suspect:
                self._start_over(request)
            else:
                self.park_again(request)

    def _is_to_blame(self, request: Request) -> bool:
        """A worker ended that had it to compute. One that had it on trial ended for it, as far as
        can be told."""
        was_tried = request.is_suspect
        request.num_losses += 1
        if request.num_losses >= SUSPECT_LOSSES:
            request.suspect_until = len(request.tokens) + TRIAL_TOKENS
        return was_tried or request.num_losses > MAX_LOSSES

    def _start_over(self, request: Request) -> None:
        self._dispatch.remove(request)
        self.release_source(request)
        request.on(Event.WORKER_LOST)
        self.put_back(request, "its worker or pages are lost")
