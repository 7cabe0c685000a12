"""What a gateway process is told."""

from dataclasses import dataclass
from pathlib import Path

from nodeserve.errors import ConfigError
from nodeserve.text.tool_parser import STYLES

MAX_BODY_BYTES = 16 << 20  # a context of a million tokens, written as numbers, takes half of it
STOP_TIMEOUT_S = 30
TOOL_CALL_PARSERS = tuple(STYLES)
SHARED_METERS = "PROMETHEUS_MULTIPROC_DIR"  # prometheus-client's; a folder of counters


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """`api_keys` empty: everybody who can connect may ask."""

    socket: str | None = None  # the server's; None: where `nodeserve start` puts it
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = MAX_BODY_BYTES
    cors_origins: tuple[str, ...] = ()  # none: no browser page of another origin may ask
    body_timeout_s: float = 30.0  # for a request to arrive
    connect_timeout_s: float = 5.0  # for the server to answer
    stop_timeout_s: int = STOP_TIMEOUT_S  # for running answers, once told to stop
    tool_call_parser: str | None = None  # one of those; None: by the chat template


def read_keys(path: Path | None, from_environment: str | None) -> tuple[str, ...]:
    """API keys: a file's lines, less comments (#) and empty ones, and that of the environment.

    ConfigError where a file is named that cannot be read or has none: then nobody is let in by
    mistake.
    """
    keys = [from_environment] if from_environment else []
    if path is not None:
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as problem:
            raise ConfigError(f"--api-key-file {path} cannot be read: {problem}") from None
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise ConfigError(f"--api-key-file {path} has no key: write one on each line")
        keys += found
    return tuple(keys)
