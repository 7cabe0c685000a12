"""The project's one logger. Quiet unless a process that owns a terminal or a file sets it up."""

import logging

logger = logging.getLogger("nodeserve")
logger.addHandler(logging.NullHandler())


def log_to_stderr(level: int = logging.INFO) -> None:
    """Lines of time, level and message on stderr; for processes that people read."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(level)
