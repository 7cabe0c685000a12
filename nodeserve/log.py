"""The project's one logger. Quiet unless a process that owns a terminal or a file sets it up.

A line for each event that matters to whoever runs a node; what may happen a thousand times a second
is summed up by those who log it. No line has anything that a client wrote: lengths, codes and ids
that were checked, never text, token ids or the values of fields.
"""

import json
import logging
from datetime import UTC, datetime
from typing import Any

from nodeserve.errors import ConfigError

LEVELS = ("debug", "info", "warning", "error")
STYLES = ("text", "json")

logger = logging.getLogger("nodeserve")
logger.addHandler(logging.NullHandler())


def about(event: str, **facts: Any) -> dict[str, dict[str, Any]]:
    """For `extra=` of a call: the event's name, and what it is about, as fields of JSON lines."""
    return {"facts": {"event": event, **facts}}


class JsonLines(logging.Formatter):
    """One object a line. The time is UTC, to the millisecond."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        values: dict[str, Any] = {
            "time": at.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "process": self._process,
            "pid": record.process,
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            values["traceback"] = self.formatException(record.exc_info)
        return json.dumps(values, default=str)


def set_up(process: str, level: str = "info", style: str = "text") -> None:
    """Lines on stderr, once a process: ours from `level` on, of libraries warnings. ConfigError for
    a level or style that there is not. `process` is what JSON lines call this one."""
    for option, given, known in (("level", level, LEVELS), ("format", style, STYLES)):
        if given not in known:
            raise ConfigError(f"--log-{option} {given}: use {', '.join(known)}")
    words = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines(process) if style == "json" else words)
    logging.getLogger().addHandler(handler)
    logger.setLevel(level.upper())


def tell_keeper() -> None:
    """Warnings as bare lines on stderr, for a process whose keeper logs what it writes there."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
