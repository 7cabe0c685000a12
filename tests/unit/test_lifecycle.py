"""The table of a request's life, enumerated."""

import pytest

from nodeserve.errors import LifecycleError
from nodeserve.policy.lifecycle import TRANSITIONS, Event, Phase, advance

RUNNING = set(Phase) - {Phase.WAITING, Phase.DRAINING, Phase.DONE}


def test_every_phase_has_a_row_and_every_event_is_used() -> None:
    assert set(TRANSITIONS) == set(Phase)
    assert {event for row in TRANSITIONS.values() for event in row} == set(Event)


def test_done_is_final() -> None:
    for event in Event:
        with pytest.raises(LifecycleError, match=event.name):
            advance(Phase.DONE, event)


def test_every_phase_can_be_cancelled_and_can_reach_its_end() -> None:
    for phase in RUNNING:
        assert advance(phase, Event.CANCELLED) is Phase.DRAINING
    assert advance(Phase.WAITING, Event.CANCELLED) is Phase.DONE
    assert advance(Phase.DRAINING, Event.RELEASED) is Phase.DONE


def test_what_crossed_with_a_cancel_changes_nothing() -> None:
    for event in set(TRANSITIONS[Phase.DRAINING]) - {Event.RELEASED}:
        assert advance(Phase.DRAINING, event) is Phase.DRAINING


def test_a_lost_worker_puts_work_back_and_loses_none() -> None:
    for phase in RUNNING - {Phase.MOVING}:  # a lost puller is a refusal
        assert advance(phase, Event.WORKER_LOST) is Phase.WAITING
    assert advance(Phase.MOVING, Event.KV_REFUSED) is Phase.PARKED
