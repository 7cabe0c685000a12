"""Server-sent events as bytes come in. No connection, no clock."""

from dataclasses import dataclass, field

from nodeserve.errors import ProtocolError

MAX_EVENT_BYTES = 1 << 24


@dataclass(slots=True)
class EventReader:
    """`feed` gives the data of the events that are complete; ProtocolError if one never ends."""

    _buffer: bytearray = field(default_factory=bytearray)
    _data: list[str] = field(default_factory=list)

    def feed(self, data: bytes) -> list[str]:
        """The data of each event that ends in `data`; comments and other fields are left out."""
        self._buffer += data
        if len(self._buffer) > MAX_EVENT_BYTES:
            raise ProtocolError("an event of the stream is too long")
        *lines, rest = self._buffer.split(b"\n")
        self._buffer = rest
        events = []
        for raw in lines:
            line = raw.removesuffix(b"\r").decode("utf-8", "replace")
            if line.startswith("data:"):
                self._data.append(line[5:].removeprefix(" "))
            elif not line and self._data:
                events.append("\n".join(self._data))
                self._data.clear()
        return events
