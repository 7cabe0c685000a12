"""Who may connect, from the settings to the socket's file."""

import fcntl
import grp
import os
import pwd
import socket
import stat
from contextlib import ExitStack
from pathlib import Path

import pytest

from nodeserve.config import EngineConfig
from nodeserve.coordinator import listener
from nodeserve.coordinator.access import Access, Peer, access_of, peer_of, user_name
from nodeserve.coordinator.listener import bound_socket
from nodeserve.errors import ConfigError, Forbidden

ME = os.getuid()
STRANGER = 54321


def test_nobody_else_by_default() -> None:
    assert access_of(EngineConfig()) == Access(0o600, None, None)


def test_a_group_may_read_and_write_unless_a_mode_is_given() -> None:
    group = grp.getgrgid(os.getgid())
    for name in (group.gr_name, str(group.gr_gid)):
        assert access_of(EngineConfig(socket_group=name)) == Access(0o660, group.gr_gid, None)
    both = access_of(EngineConfig(socket_group=group.gr_name, socket_mode="600"))
    assert both.mode == 0o600


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"socket_mode": "rw"}, "--socket-mode rw: use three octal digits"),
        ({"socket_mode": "1777"}, "--socket-mode 1777"),
        ({"socket_mode": "060"}, "--socket-mode 060"),
        ({"socket_mode": "-600"}, "--socket-mode -600"),
        ({"socket_group": "no-such-group"}, "--socket-group no-such-group: there is no such"),
        ({"socket_group": str(2**32 - 1)}, "--socket-group 4294967295: there is no such"),
        ({"allow_users": "root,no-such-user"}, "there is no user 'no-such-user'"),
        ({"allow_users": ""}, "there is no user ''"),
    ],
)
def test_what_cannot_be_is_said(settings: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        access_of(EngineConfig(**settings))  # type: ignore[arg-type]


def test_a_list_of_users_is_beside_ourselves_and_root() -> None:
    access = access_of(EngineConfig(allow_users=f"{STRANGER}, {pwd.getpwuid(ME).pw_name}"))
    for uid in (STRANGER, ME, 0):
        access.check(Peer(1, uid, 0))
    with pytest.raises(Forbidden, match=f"user {STRANGER + 1} may not use this server"):
        access.check(Peer(1, STRANGER + 1, 0))


def test_without_a_list_the_mode_decides() -> None:
    Access().check(Peer(1, STRANGER, 0))


def test_the_kernel_names_the_peer() -> None:
    left, right = socket.socketpair(socket.AF_UNIX)
    with left, right:
        assert peer_of(left) == (os.getpid(), ME, os.getgid())
    assert str(Peer(12, STRANGER, 0)) == f"pid 12 of user {STRANGER}"
    assert user_name(ME) == pwd.getpwuid(ME).pw_name


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
def test_the_file_has_its_mode_and_goes_with_the_block(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(0o711)
    path = tmp_path / "s"
    with bound_socket(path, Access(mode, os.getgid())):
        status = path.stat()
        assert stat.S_IMODE(status.st_mode) == mode and status.st_gid == os.getgid()
    assert not path.exists()


def test_a_folder_that_keeps_others_out_is_said_and_leaves_no_file(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    path = tmp_path / "s"
    with (
        pytest.raises(ConfigError, match="keeps them out: choose a --socket"),
        bound_socket(path, Access(0o660)),
    ):
        raise AssertionError("it was opened")
    assert not path.exists()


def test_a_group_that_we_may_not_give_is_said_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    tmp_path.chmod(0o711)
    monkeypatch.setattr(os, "chown", refuse)
    with (
        pytest.raises(ConfigError, match="not permitted; choose a --socket-group"),
        bound_socket(tmp_path / "s", Access(0o660, STRANGER)),
    ):
        raise AssertionError("it was opened")
    assert not (tmp_path / "s").exists()


def test_a_node_on_its_way_down_leaves_its_successors_socket(tmp_path: Path) -> None:
    """A file system may give a new file the number of the one that was just removed."""
    path = tmp_path / "s"
    with bound_socket(path, Access()) as listener:
        listener.close()  # clients are told; meanwhile the next node starts
        with ExitStack() as later:
            later.enter_context(bound_socket(path, Access()))
            successor = later.pop_all()
    assert path.exists()
    successor.close()
    assert not path.exists()


def test_two_that_start_in_one_folder_wait_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other looks and binds, and is done at our third pause."""
    folder = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            os.close(folder)

    monkeypatch.setattr("time.sleep", pause)
    with bound_socket(tmp_path / "s", Access()):
        assert len(pauses) == 3
    stuck = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(stuck, fcntl.LOCK_EX)
    monkeypatch.setattr(listener, "LOCK_PATIENCE_S", 0.0)
    with (
        pytest.raises(ConfigError, match="another server is starting"),
        bound_socket(tmp_path / "s", Access()),
    ):
        pass
    os.close(stuck)
    assert not (tmp_path / "s").exists()
