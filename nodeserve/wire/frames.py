"""Frames on the Unix socket: a 4-byte little-endian length, then that many bytes of one message."""

import struct

from nodeserve.errors import FrameTooLarge

HEADER = struct.Struct("<I")


def frame(payload: bytes) -> bytes:
    """`payload` with its length in front."""
    return HEADER.pack(len(payload)) + payload


class FrameReader:
    """Cuts a byte stream into payloads; holds at most one incomplete frame."""

    def __init__(self, max_frame_bytes: int) -> None:
        self.max_frame_bytes = max_frame_bytes
        self._buffer = bytearray()

    @property
    def incomplete(self) -> bool:
        """True when the stream stopped in the middle of a frame."""
        return bool(self._buffer)

    @property
    def num_held_bytes(self) -> int:
        """Of the incomplete frame."""
        return len(self._buffer)

    def feed(self, data: bytes) -> list[bytes]:
        """The payloads that `data` completes, in order; FrameTooLarge on an announced excess."""
        buffer = self._buffer
        buffer += data
        payloads, position = [], 0
        while len(buffer) - position >= HEADER.size:
            (size,) = HEADER.unpack_from(buffer, position)
            if size > self.max_frame_bytes:
                raise FrameTooLarge(
                    f"a frame of {size} bytes is over the limit of {self.max_frame_bytes}"
                )
            end = position + HEADER.size + size
            if end > len(buffer):
                break
            payloads.append(bytes(buffer[position + HEADER.size : end]))
            position = end
        del buffer[:position]
        return payloads
