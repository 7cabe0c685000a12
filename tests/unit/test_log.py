"""Lines of the log: for people, and for programs; and what is summed up before it is one."""

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nodeserve import log
from nodeserve.cli.progress import log_event
from nodeserve.coordinator.tally import Tally
from nodeserve.errors import ConfigError, Forbidden
from nodeserve.log import about, logger
from nodeserve.types import Role, StartEvent
from tests.fakes.node import FakeNode

Lines = Callable[[], list[str]]


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Iterator[Lines]:
    """What was written on stderr; loggers that the test sets up are as before after it."""
    root = logging.getLogger()
    handlers, ours, level = list(root.handlers), list(logger.handlers), logger.level
    yield lambda: capsys.readouterr().err.splitlines()
    root.handlers[:], logger.handlers[:] = handlers, ours
    logger.setLevel(level)


def objects(lines: Lines) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines()]


def test_json_lines_have_the_facts_as_fields(lines: Lines) -> None:
    log.set_up("server", style="json")
    logger.warning("instance %d is\nback", 3, extra=about("instance_back", instance=3, why=None))
    (found,) = objects(lines)
    assert found.pop("time")[10] == "T" and found.pop("pid") > 0
    assert found == {
        **{"level": "warning", "process": "server", "message": "instance 3 is\nback"},
        **{"event": "instance_back", "instance": 3, "why": None},
    }


def test_a_time_is_utc_with_milliseconds() -> None:
    record = logging.makeLogRecord({"created": 1_700_000_000.25, "msg": "x"})
    found = json.loads(log.JsonLines("server").format(record))
    assert found["time"] == "2023-11-14T22:13:20.250Z"


def test_a_traceback_is_a_field(lines: Lines) -> None:
    log.set_up("server", style="json")
    try:
        raise ValueError("oh")
    except ValueError as problem:
        logger.error("it crashed", exc_info=problem)
    (found,) = objects(lines)
    assert found["traceback"].endswith("ValueError: oh")


def test_text_lines_are_time_level_and_words(lines: Lines) -> None:
    log.set_up("server")
    logger.info("ready", extra=about("start"))
    logger.debug("not this")
    (line,) = lines()
    time, rest = line.split(" ", 1)
    assert len(time.split(":")) == 3 and rest == "INFO ready"


def test_levels_are_for_ours_and_warnings_of_others_are_seen(lines: Lines) -> None:
    log.set_up("server", level="debug", style="json")
    logger.debug("ours")
    logging.getLogger("other").info("not this")
    logging.getLogger("other").warning("theirs")
    assert [one["message"] for one in objects(lines)] == ["ours", "theirs"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"level": "loud"}, "--log-level loud: use debug"), ({"style": "xml"}, "--log-format xml")],
)
def test_what_there_is_not_is_refused(settings: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        log.set_up("server", **settings)


def test_a_worker_tells_its_keeper_in_bare_lines(lines: Lines) -> None:
    log.tell_keeper()
    logger.warning("no graph for %d sequences", 8)
    logger.info("not this")
    assert lines() == ["no graph for 8 sequences"]


def test_a_start_is_lines_where_nobody_watches(lines: Lines) -> None:
    log.set_up("server", style="json")
    log_event(StartEvent("model", None, 1, 1, "demo"))
    log_event(StartEvent("loading", 0, 1, 2, "weights"))
    log_event(StartEvent("ready", None, 1, 1, "/srv/ns.sock"))
    assert [(one["phase"], one["message"]) for one in objects(lines)] == [
        ("model", "model demo"),
        ("ready", "ready: /srv/ns.sock"),
    ]


# ---- summed up


def test_many_refusals_are_one_line(caplog: pytest.LogCaptureFixture) -> None:
    tally = Tally()
    for code in ["overloaded"] * 1000 + ["invalid_request"]:
        tally.refused(code)
    tally.turned_away(Forbidden("user eve may not use this server"))
    assert not caplog.records
    tally.tell()
    tally.tell()
    assert [(one.levelname, one.getMessage()) for one in caplog.records] == [
        ("WARNING", "refused 1001 requests: 1000 overloaded, 1 invalid_request"),
        ("WARNING", "turned away 1 connection: 1 user eve may not use this server"),
    ]
    facts = caplog.records[0].facts  # type: ignore[attr-defined]
    assert facts["event"] == "requests_refused" and facts["kinds"]["overloaded"] == 1000


def test_what_only_clients_can_help_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "nodeserve")
    tally = Tally()
    tally.refused("prompt_too_long")
    tally.tell()
    assert [one.levelname for one in caplog.records] == ["INFO"]


async def test_a_node_counts_what_it_refuses_and_what_fails(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "nodeserve")
    node = FakeNode([Role.MIXED])
    stream, _ = node.connect()
    node.submit(stream, 1, [], 1)
    node.submit(stream, 2, [61, 62, 63, 64], 3)
    node.submit(stream, 3, [61, 62, 63, 64], 3)
    node.coordinator.abort(stream.requests[3])
    node.coordinator.end_all(Forbidden("over"))
    node.coordinator.tally.tell()
    found = [one.getMessage() for one in caplog.records]
    assert found == [
        "request 2 ended: cancelled, 4 tokens in, 0 out",
        "request 1 ended: forbidden, 4 tokens in, 0 out",
        "refused 1 request: 1 invalid_request",
        "failed 1 request: 1 forbidden",
    ]
