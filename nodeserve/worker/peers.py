"""Peers' pages as our GPU reads them: their device memory, or shared memory that they copied to."""

import ctypes
import mmap
import os
from dataclasses import dataclass
from typing import Any, Protocol

from nodeserve.errors import ConfigError
from nodeserve.worker.routes import unpack_handle


class Closes(Protocol):
    def close(self) -> None: ...


@dataclass(slots=True)
class Peer:
    """One peer's mapped pages."""

    address: int
    num_bytes: int
    written: Any | None  # the event after which what it offers is complete; None: it always is
    _parts: list[Closes]  # in the order of their closing

    def close(self) -> None:
        """After the last copy from here is over."""
        for part in self._parts:
            part.close()
        self._parts.clear()


def open_device_pages(cuda: Any, device: int, handle: bytes, num_bytes: int) -> Peer:
    """A peer's pool by its handle. HandoffFailed or CudaError if it cannot be opened."""
    memory, written = unpack_handle(handle)
    pool = cuda.PeerPool(device, memory, num_bytes)
    try:
        event = cuda.Event.open(device, written)
    except Exception:
        pool.close()
        raise
    return Peer(pool.address, num_bytes, event, [event, pool])


def open_host_pages(cuda: Any, device: int, fd: int, num_bytes: int) -> Peer:
    """The shared memory behind `fd`, pinned for our GPU."""
    if (size := os.fstat(fd).st_size) < num_bytes:
        raise ConfigError(f"a peer's pages have {size} bytes, {num_bytes} were announced")
    segment = mmap.mmap(fd, num_bytes)  # writable, as CUDA wants it for pinning
    pages = pinned(cuda, device, segment, num_bytes)
    return Peer(pages.address, num_bytes, None, [pages, segment])


def pinned(cuda: Any, device: int, segment: mmap.mmap, num_bytes: int) -> Any:
    """_cuda.HostPages over a mapping, which must stay until they are closed."""
    start = ctypes.addressof(ctypes.c_char.from_buffer(segment))
    return cuda.HostPages(start, num_bytes, device)
