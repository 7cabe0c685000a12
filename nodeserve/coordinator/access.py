"""Who may connect: the socket file's mode and group, and the users whom the kernel names."""

import grp
import os
import pwd
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from nodeserve.config import EngineConfig
from nodeserve.errors import ConfigError, Forbidden

PRIVATE, FOR_GROUP = 0o600, 0o660
MAX_ID = 2**32 - 2  # the number above it stands for "as it is"
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


class Peer(NamedTuple):
    """The process that connected, as it was then."""

    pid: int
    uid: int
    gid: int

    def __str__(self) -> str:
        return f"pid {self.pid} of user {user_name(self.uid)}"


@dataclass(frozen=True, slots=True)
class Access:
    """`users` None: everybody whom the file's mode lets in. Our own user and root always may."""

    mode: int = PRIVATE
    gid: int | None = None
    users: frozenset[int] | None = None

    def check(self, peer: Peer) -> None:
        """Forbidden unless this process may be served."""
        if self.users is None or peer.uid in (self.users | {0, os.getuid()}):
            return
        raise Forbidden(f"user {user_name(peer.uid)} may not use this server (--allow-users)")

    def apply(self, path: Path) -> None:
        """To the file of a socket that nobody can connect to yet. ConfigError if that may not be,
        or if those whom it lets in could not reach it."""
        others = self.mode & 0o077
        if others and not path.parent.stat().st_mode & 0o011:
            raise ConfigError(
                f"--socket-mode and --socket-group open {path} to others, but {path.parent} keeps"
                " them out: choose a --socket in a folder that they may enter"
            )
        try:
            if self.gid is not None:
                os.chown(path, -1, self.gid)
            path.chmod(self.mode)
        except OSError as problem:
            raise ConfigError(
                f"cannot give {path} to group {self.gid}: {problem.strerror}; choose a"
                " --socket-group that this user is in"
            ) from None


def peer_of(connected: socket.socket) -> Peer:
    """Who is at the other end, by the kernel's word (SO_PEERCRED)."""
    data = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return Peer(*_CREDENTIALS.unpack(data))


def access_of(config: EngineConfig) -> Access:
    """From the settings; ConfigError names the one that cannot be."""
    gid = None if config.socket_group is None else _gid(config.socket_group)
    mode = PRIVATE if gid is None else FOR_GROUP
    if config.socket_mode is not None:
        mode = _mode(config.socket_mode)
    users = None
    if config.allow_users is not None:
        users = frozenset(_uid(name.strip()) for name in config.allow_users.split(","))
    return Access(mode, gid, users)


def user_name(uid: int) -> str:
    """As people know it; the number where nobody has it."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _mode(text: str) -> int:
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777 or mode & PRIVATE != PRIVATE:
        raise ConfigError(
            f"--socket-mode {text}: use three octal digits that let the owner read and write, such"
            " as 600, 660 or 666"
        )
    return mode


def _gid(name: str) -> int:
    try:
        gid = int(name) if name.isdecimal() else grp.getgrnam(name).gr_gid
        if gid > MAX_ID:
            raise KeyError(name)
        return gid
    except KeyError:
        raise ConfigError(f"--socket-group {name}: there is no such group") from None


def _uid(name: str) -> int:
    try:
        return int(name) if name.isdecimal() else pwd.getpwnam(name).pw_uid
    except KeyError:
        raise ConfigError(
            f"--allow-users: there is no user {name!r}; give names or numbers with commas between"
        ) from None
