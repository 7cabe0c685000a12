import os
from pathlib import Path

import pytest

from nodeserve.errors import ConfigError
from nodeserve.socket_path import MAX_PATH_BYTES, socket_path


def test_the_order_of_places(tmp_path: Path) -> None:
    temporary = {"TMPDIR": str(tmp_path)}
    runtime = {**temporary, "XDG_RUNTIME_DIR": "/run/user/7"}
    named = {**runtime, "NODESERVE_SOCKET": "/srv/a.sock"}
    assert socket_path("/b.sock", named) == Path("/b.sock")
    assert socket_path(None, named) == Path("/srv/a.sock")
    assert socket_path(None, runtime) == Path("/run/user/7/nodeserve.sock")
    private = tmp_path / f"nodeserve-{os.getuid()}"
    assert socket_path(None, temporary) == private / "nodeserve.sock"
    assert not private.exists()
    assert socket_path(None, {**named, "NODESERVE_SOCKET": ""}) == socket_path(None, runtime)


def test_a_relative_path_is_made_absolute() -> None:
    assert socket_path("x.sock", {}) == Path.cwd() / "x.sock"


def test_a_server_makes_the_private_folder_once(tmp_path: Path) -> None:
    environ = {"TMPDIR": str(tmp_path)}
    path = socket_path(None, environ, create=True)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert socket_path(None, environ, create=True) == path
    assert socket_path(None, environ) == path


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o701])
def test_a_folder_that_others_may_enter_is_refused(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / f"nodeserve-{os.getuid()}"
    folder.mkdir()
    folder.chmod(mode)
    for create in (True, False):
        with pytest.raises(ConfigError, match="not a folder of this user alone"):
            socket_path(None, {"TMPDIR": str(tmp_path)}, create=create)


def test_a_link_or_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / f"nodeserve-{os.getuid()}"
    elsewhere.mkdir(mode=0o700)
    folder.symlink_to(elsewhere)
    with pytest.raises(ConfigError):
        socket_path(None, {"TMPDIR": str(tmp_path)})
    folder.unlink()
    folder.touch(mode=0o600)
    with pytest.raises(ConfigError):
        socket_path(None, {"TMPDIR": str(tmp_path)}, create=True)


def test_a_temporary_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        socket_path(None, {"TMPDIR": str(tmp_path / "missing")}, create=True)


def test_the_folder_of_another_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nodeserve-12345").mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(ConfigError):
        socket_path(None, {"TMPDIR": str(tmp_path)})


def test_a_path_too_long_for_a_socket_is_refused() -> None:
    fits = "/" + "x" * (MAX_PATH_BYTES - 1)
    assert socket_path(fits, {}) == Path(fits)
    for wrong in (fits + "x", "/" + "ä" * 54):
        with pytest.raises(ConfigError, match="at most 107"):
            socket_path(wrong, {})
