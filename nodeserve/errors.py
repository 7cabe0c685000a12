"""Every error that a person or a client can meet.

Each class carries the code that goes on the wire and the HTTP status a gateway answers with. Our
own bugs are asserts; these are for the world.
"""


class NodeServeError(Exception):
    """Base of all typed errors; the message says what is wrong and what to do about it."""

    code = "internal"
    http_status = 500

    def __init__(self, message: str = "", retry_after_s: float | None = None) -> None:
        """`retry_after_s`: when it may be worth another try, if the server said so."""
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ConfigError(NodeServeError):
    """A setting, a layout or a flag cannot be used as given."""

    code, http_status = "bad_config", 400


class ModelError(NodeServeError):
    """The model cannot be found, read or run."""

    code, http_status = "bad_model", 400


class InvalidRequest(NodeServeError):
    """A request's field is missing, unknown or out of range; the message names the field."""

    code, http_status = "invalid_request", 400


class PromptTooLong(InvalidRequest):
    """The prompt leaves no room for one new token in the context or in a worker's pages."""

    code = "prompt_too_long"


class ProtocolError(NodeServeError):
    """Bytes on a socket or ring that are not a message of the protocol."""

    code, http_status = "protocol", 400


class FrameTooLarge(ProtocolError):
    """A frame announces more bytes than the limit in the server's Hello."""

    code, http_status = "frame_too_large", 413


class Overloaded(NodeServeError):
    """The server cannot take the request now: its queue is full, or the SLO would be missed."""

    code, http_status = "overloaded", 429


class Forbidden(NodeServeError):
    """The user behind the connection may not use this server."""

    code, http_status = "forbidden", 403


class Cancelled(NodeServeError):
    """The request was cancelled before it finished."""

    code, http_status = "cancelled", 499


class WorkerLost(NodeServeError):
    """A worker process ended or failed while it held the request."""

    code, http_status = "worker_lost", 502


class HandoffFailed(NodeServeError):
    """The pages of a request could not be moved to its decode worker."""

    code, http_status = "handoff_failed", 502


class ShuttingDown(NodeServeError):
    """The server is stopping and takes no new requests."""

    code, http_status = "shutting_down", 503


class ConnectionLost(NodeServeError):
    """No server answers on the socket, or the connection ended in the middle of a request."""

    code, http_status = "connection_lost", 503


class RingError(NodeServeError):
    """A shared-memory ring was used against its contract, or its contents are damaged."""

    code = "ring"


class RecordTooLarge(RingError):
    """A record cannot fit the ring even when it is empty."""

    code = "record_too_large"


class TeamError(NodeServeError):
    """Workers of one instance do not agree on what they compute; the instance starts again."""

    code = "team"


class OutOfBlocks(NodeServeError):
    """Fewer free KV blocks than asked for; nothing was taken."""

    code, http_status = "out_of_blocks", 503


class LifecycleError(NodeServeError):
    """An event that is not legal in the phase a request is in."""

    code = "lifecycle"


class BadArgument(NodeServeError, ValueError):
    """A value handed to the CUDA extension cannot be right; the message begins with its name."""

    code = "bad_argument"


class CudaError(NodeServeError, RuntimeError):
    """A call of the CUDA runtime failed; the message has file, line and CUDA's own words."""

    code = "cuda"

    def __init__(self, message: str, number: int = 0, name: str = "") -> None:
        """`number` and `name` are CUDA's: 2 and cudaErrorMemoryAllocation."""
        super().__init__(message)
        self.number = number
        self.name = name


def _subclasses(cls: type[NodeServeError]) -> list[type[NodeServeError]]:
    return [cls, *(sub for child in cls.__subclasses__() for sub in _subclasses(child))]


ERRORS: dict[str, type[NodeServeError]] = {cls.code: cls for cls in _subclasses(NodeServeError)}


def from_code(code: str, message: str) -> NodeServeError:
    """The error that travelled as `code`; an unknown code keeps its message under the base."""
    return ERRORS.get(code, NodeServeError)(message)
