"""Where the server's Unix socket is: one answer for the server and for every client.

Explicit, else $NODESERVE_SOCKET, else $XDG_RUNTIME_DIR/nodeserve.sock, else nodeserve.sock in the
user's own folder below the temporary one. That folder is in a place where anybody may write, so it
counts only when it belongs to this user and nobody else may look into it.
"""

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from nodeserve.errors import ConfigError

MAX_PATH_BYTES = 107  # sun_path has 108, the last is a zero
FILE_NAME = "nodeserve.sock"


def socket_path(
    explicit: str | os.PathLike[str] | None, environ: Mapping[str, str], *, create: bool = False
) -> Path:
    """The socket's absolute path; with `create` (for a server) the private folder is made."""
    named = explicit if explicit is not None else environ.get("NODESERVE_SOCKET") or None
    if named is not None:
        return _checked(Path(named).expanduser().absolute())
    if runtime := environ.get("XDG_RUNTIME_DIR"):
        return _checked(Path(runtime).absolute() / FILE_NAME)
    folder = Path(environ.get("TMPDIR") or "/tmp").absolute() / f"nodeserve-{os.getuid()}"
    path = _checked(folder / FILE_NAME)
    if create:
        _make_private(folder)
    _refuse_foreign(folder)
    return path


def _checked(path: Path) -> Path:
    length = len(os.fsencode(path))
    if length > MAX_PATH_BYTES:
        raise ConfigError(
            f"the socket path {path} has {length} bytes, at most {MAX_PATH_BYTES} are possible:"
            " choose a shorter one with --socket or NODESERVE_SOCKET"
        )
    return path


def _make_private(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        pass  # ours or not: looked at next
    except OSError as problem:
        raise ConfigError(
            f"cannot make {folder} for the socket ({problem.strerror}): choose another place with"
            " --socket or NODESERVE_SOCKET"
        ) from None


def _refuse_foreign(folder: Path) -> None:
    try:
        status = folder.lstat()
    except FileNotFoundError:
        return
    private = stat.S_ISDIR(status.st_mode) and not status.st_mode & 0o077
    if not private or status.st_uid != os.getuid():
        raise ConfigError(
            f"{folder} is not a folder of this user alone (mode 0700): remove it, or choose the"
            " socket with --socket or NODESERVE_SOCKET"
        )
