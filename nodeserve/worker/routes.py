"""How pages leave a GPU worker, and the words in which a peer is told.

A peer GPU reads our pool directly where the hardware lets it. Else pages go through pinned shared
memory of the host: twice over the bus, but on any machine.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from nodeserve.errors import ConfigError, HandoffFailed

IPC, HOST = "ipc", "host"
_HANDLE_BYTES = 64  # of a cudaIpcMemHandle_t and of a cudaIpcEventHandle_t
_HANDLES = struct.Struct(f"{_HANDLE_BYTES}s{_HANDLE_BYTES}s")


@dataclass(frozen=True, slots=True)
class Route:
    """The way out of one worker."""

    kind: str  # IPC or HOST
    description: str  # for the start log and `status`


def choose_route(
    wish: str, gpus: Sequence[int], readers: Sequence[bool], obstacle: str | None = None
) -> Route:
    """The route for the worker on `gpus[0]`.

    wish: --handoff; readers: for each of `gpus[1:]`, whether it can read ours; obstacle: why our
    memory cannot be exported at all. ConfigError if the wish cannot be met.
    """
    reason = obstacle or _blocked(gpus, readers)
    if wish == HOST:
        return Route(HOST, "pinned host memory")
    if reason is None:
        return Route(IPC, "CUDA IPC")
    if wish == IPC:
        raise ConfigError(f"--handoff ipc: {reason}; use --handoff auto or host")
    return through_host(reason)


def through_host(reason: str) -> Route:
    return Route(HOST, f"pinned host memory: {reason}")


def _blocked(gpus: Sequence[int], readers: Sequence[bool]) -> str | None:
    own, *others = gpus
    blind = [str(gpu) for gpu, reads in zip(others, readers, strict=True) if not reads]
    if not blind:
        return None
    plural = "s" if len(blind) > 1 else ""
    return f"GPU{plural} {', '.join(blind)} cannot read GPU {own}"


def pack_handle(memory: bytes, written: bytes) -> bytes:
    """What a peer needs to open a pool: its memory's handle, and that of the event after which
    offered pages are complete."""
    assert len(memory) == len(written) == _HANDLE_BYTES, (len(memory), len(written))
    return _HANDLES.pack(memory, written)


def unpack_handle(handle: bytes) -> tuple[bytes, bytes]:
    """Inverse of pack_handle; HandoffFailed for bytes that are none."""
    if len(handle) != _HANDLES.size:
        raise HandoffFailed(
            f"a peer's page handle has {len(handle)} bytes, not {_HANDLES.size}: its worker is of"
            " another version or device"
        )
    memory, written = _HANDLES.unpack(handle)
    return memory, written
