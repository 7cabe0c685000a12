"""What a start shows, and that nobody has to see it."""

import pytest

from nodeserve.cli.progress import StartReport
from nodeserve.types import StartEvent


class ClosedPainter:
    """On a pipe that nobody reads."""

    def line(self, text: str) -> None:
        raise BrokenPipeError

    def loading(self, event: StartEvent) -> None:
        raise BrokenPipeError

    def close(self) -> None:
        raise BrokenPipeError


@pytest.mark.parametrize("phase", ["model", "workers", "loading", "ready"])
def test_a_start_goes_on_when_its_reader_has_gone(phase: str) -> None:
    with StartReport(ClosedPainter()) as report:
        report.on_event(StartEvent(phase, 0, 1, 2, "weights"))
