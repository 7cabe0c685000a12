"""A connection in memory, from the server's side: what a client would receive."""

from nodeserve.wire.frames import FrameReader
from nodeserve.wire.messages import TO_CLIENT, End, ToClient, Tokens, Traced
from nodeserve.wire.numbers import unpack_ids


class FakeTransport:
    """Collects what a client would receive."""

    def __init__(self) -> None:
        self.reader = FrameReader(1 << 24)
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, list[End]] = {}
        self.traced: list[Traced] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        assert not self.closed
        for payload in self.reader.feed(data):
            self.take(TO_CLIENT.decode(payload))

    def take(self, message: ToClient) -> None:
        match message:
            case Tokens(items):
                for request_id, token_ids, _ in items:
                    assert request_id not in self.ends, "a token after the end"
                    self.tokens.setdefault(request_id, []).extend(unpack_ids(token_ids))
            case End() as end:
                self.ends.setdefault(end.request_id, []).append(end)
            case Traced() as traced:
                self.traced.append(traced)

    def close(self) -> None:
        self.closed = True

    abort = close
