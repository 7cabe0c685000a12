"""Where a gateway listens: addresses, and sockets bound to them.

Sockets are bound by the process that keeps the gateways and inherited by these, so a bad address
shows at once, and connections wait in the socket while a gateway that ended is started again.
"""

import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nodeserve.errors import ConfigError
from nodeserve.socket_path import MAX_PATH_BYTES

BACKLOG_CONNECTIONS = 2048
UNIX = "unix:"
LOOPBACK = ("127.", "::1", "localhost")


@dataclass(frozen=True, slots=True)
class Address:
    """A host and a port (0: any that is free), or the path of a Unix socket."""

    host: str = ""
    port: int = 0
    path: Path | None = None

    def __str__(self) -> str:
        """For people, and for `base_url` where it is TCP."""
        if self.path is not None:
            return f"{UNIX}{self.path}"
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    @property
    def private(self) -> bool:
        """Nobody from another machine can reach it."""
        return self.path is not None or self.host.startswith(LOOPBACK)


def parse_address(text: str) -> Address:
    """ "HOST:PORT", "[IPV6]:PORT", ":PORT" for every interface, or "unix:PATH"."""
    if text.startswith(UNIX):
        path = Path(text.removeprefix(UNIX)).expanduser().absolute()
        if len(os.fsencode(path)) > MAX_PATH_BYTES:
            raise ConfigError(f"--http {text}: the path has more than {MAX_PATH_BYTES} bytes")
        return Address(path=path)
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"--http {text}: use HOST:PORT, such as 127.0.0.1:8000, or unix:PATH")
    return Address(host.removeprefix("[").removesuffix("]") or "0.0.0.0", int(port))


@contextlib.contextmanager
def listening(address: Address, count: int) -> Iterator[tuple[Address, list[socket.socket]]]:
    """A socket for each of `count` processes, among which the kernel spreads connections; of a
    path there is one, shared. Yields the address with its real port."""
    with contextlib.ExitStack() as owner:
        if address.path is not None:
            yield address, [owner.enter_context(_unix(address.path))] * count
            return
        sockets = [owner.enter_context(contextlib.closing(_tcp(address, count > 1)))]
        address = Address(address.host, sockets[0].getsockname()[1])
        while len(sockets) < count:
            sockets.append(owner.enter_context(contextlib.closing(_tcp(address, True))))
        yield address, sockets


def _tcp(address: Address, shared: bool) -> socket.socket:
    try:
        found = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, _, _, _, where = found[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shared:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(where)
            listener.listen(BACKLOG_CONNECTIONS)
        except BaseException:
            listener.close()
            raise
    except OSError as problem:
        raise ConfigError(f"--http: cannot listen on {address}: {problem.strerror}") from None
    return listener


@contextlib.contextmanager
def _unix(path: Path) -> Iterator[socket.socket]:
    """For this user alone (mode 0600); the file goes with the block."""
    _remove_stale(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        old_mask = os.umask(0o177)
        try:
            listener.bind(str(path))
        except OSError as problem:
            raise ConfigError(f"--http: cannot bind {path}: {problem.strerror}") from None
        finally:
            os.umask(old_mask)
        listener.listen(BACKLOG_CONNECTIONS)
        ours = path.stat().st_ino
        try:
            yield listener
        finally:
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ino == ours:
                    path.unlink()


def _remove_stale(path: Path) -> None:
    """The file of a gateway that is gone; ConfigError for anything else that is there."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        return  # nothing there; what else may be wrong, bind says
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"--http: {path} exists and is no socket: remove it or choose another")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError as problem:
            raise ConfigError(f"--http: cannot use {path}: {problem.strerror}") from None
    raise ConfigError(f"--http: somebody listens on {path} already: choose another")
