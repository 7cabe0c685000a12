"""HTTP/1.1 and server-sent events as bytes come in. No connection, no clock."""

from dataclasses import dataclass, field

from nodeserve.errors import ProtocolError

MAX_HEAD_BYTES = 1 << 16
MAX_LINE_BYTES = 1 << 24


@dataclass(slots=True)
class ResponseReader:
    """One response: `feed` gives the bytes of its body that came. `status` is 0 before its head."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)  # names in lower case
    ended: bool = False
    _buffer: bytearray = field(default_factory=bytearray)
    _missing: int | None = None  # bytes of the body or chunk; None: until the connection ends
    _chunked: bool = False
    _at: str = "head"  # head, body, size, chunk, chunk end, trailer

    @property
    def reusable(self) -> bool:
        """Whether the connection may carry another request after this one."""
        kept = self.headers.get("connection", "keep-alive").lower() != "close"
        return self.ended and kept and (self._chunked or self._missing is not None)

    def feed(self, data: bytes) -> bytes:
        """Body bytes in `data`; ProtocolError for what is no HTTP."""
        self._buffer += data
        body = bytearray()
        while not self.ended and self._step(body):
            pass
        return bytes(body)

    def eof(self) -> None:
        """The connection ended; ProtocolError if that cuts the response short."""
        if self._at == "body" and self._missing is None:
            self.ended = True
        if not self.ended:
            raise ProtocolError("the connection ended in the middle of a response")

    def _step(self, body: bytearray) -> bool:
        """One piece of the message; False when more bytes are needed."""
        if self._at in ("body", "chunk"):
            return self._take(body)
        line = self._line()
        if line is None:
            return False
        match self._at:
            case "head" if not self.status:
                self._status_line(line)
            case "head":
                self._header(line)
            case "size":
                self._size(line)
            case "chunk end":
                self._at = "size"
            case "trailer":
                self.ended = not line
        return True

    def _line(self) -> bytes | None:
        end = self._buffer.find(b"\n")
        if end < 0:
            if len(self._buffer) > MAX_HEAD_BYTES:
                raise ProtocolError("a line of the response's head is too long to be HTTP")
            return None
        line = bytes(self._buffer[:end]).removesuffix(b"\r")
        del self._buffer[: end + 1]
        return line

    def _status_line(self, line: bytes) -> None:
        parts = line.split(None, 2)
        if len(parts) < 2 or not parts[0].startswith(b"HTTP/1.") or not parts[1].isdigit():
            raise ProtocolError(f"not an HTTP response: {line[:60]!r}")
        self.status = int(parts[1])

    def _header(self, line: bytes) -> None:
        if line:
            name, _, value = line.decode("latin-1").partition(":")
            self.headers[name.strip().lower()] = value.strip()
            return
        if 100 <= self.status < 200:  # an interim response; the real one follows
            self.status = 0
            self.headers.clear()
            return
        self._chunked = "chunked" in self.headers.get("transfer-encoding", "").lower()
        length = self.headers.get("content-length", "")
        if self._chunked:
            self._at = "size"
        else:
            self._at = "body"
            self._missing = int(length) if length.isdigit() else None
            self.ended = self._missing == 0 or self.status in (204, 304)

    def _size(self, line: bytes) -> None:
        try:
            self._missing = int(line.split(b";")[0], 16)
        except ValueError:
            raise ProtocolError(f"not the size of a chunk: {line[:60]!r}") from None
        self._at = "chunk" if self._missing else "trailer"

    def _take(self, body: bytearray) -> bool:
        num = len(self._buffer) if self._missing is None else self._missing
        part = self._buffer[:num]
        if not part:
            return False
        body += part
        del self._buffer[: len(part)]
        if self._missing is not None:
            self._missing -= len(part)
            if self._missing == 0:
                self.ended = self._at == "body"
                self._at = "chunk end"
        return True


@dataclass(slots=True)
class EventReader:
    """Server-sent events: `feed` gives the data of those that are complete."""

    _buffer: bytearray = field(default_factory=bytearray)
    _data: list[str] = field(default_factory=list)

    def feed(self, data: bytes) -> list[str]:
        """The data of each event that ends in `data`; comments and other fields are left out."""
        self._buffer += data
        if len(self._buffer) > MAX_LINE_BYTES:
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
