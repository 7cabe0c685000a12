"""python -m tests.fakes.leaky_worker --spec JSON: a simulated worker that loses something.

`NODESERVE_TEST_LEAK` says what: a block of each request that is cancelled, the request itself, or
the record that would have told of it.
"""

import os
import sys
from typing import Any

import tests.fakes.sim_worker  # noqa: F401 -- its profiles are known then
from nodeserve.policy.scheduler import Scheduler
from nodeserve.wire.messages import Dropped
from nodeserve.worker.device import load
from nodeserve.worker.link import RingLink
from nodeserve.worker.process import main

LEAK = "NODESERVE_TEST_LEAK"
LEAKY_WORKER = (sys.executable, "-m", "tests.fakes.leaky_worker")

cancel, put = Scheduler.cancel, RingLink.put


def cancel_and_keep_a_block(scheduler: Scheduler, request_id: int) -> None:
    cancel(scheduler, request_id)
    scheduler.blocks.allocate(1)


def keep_the_request(scheduler: Scheduler, request_id: int) -> None:
    pass


def lose_the_answer(link: RingLink, message: Any) -> None:
    if isinstance(message, Dropped):
        link.num_sent += 1
    else:
        put(link, message)


LEAKS: dict[str, tuple[type, str, Any]] = {
    "block": (Scheduler, "cancel", cancel_and_keep_a_block),
    "request": (Scheduler, "cancel", keep_the_request),
    "record": (RingLink, "put", lose_the_answer),
}

if __name__ == "__main__":
    owner, name, change = LEAKS[os.environ[LEAK]]
    setattr(owner, name, change)
    sys.exit(main(load))
