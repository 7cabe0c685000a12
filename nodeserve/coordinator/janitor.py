"""python -m nodeserve.coordinator.janitor SOCKET: removes what a killed coordinator could not.

Nobody can clean up after SIGKILL of itself, so the coordinator has a process that does nothing but
wait for its end: the kernel closes a pipe then. Workers need none of it, the kernel ends them. It
leads a session of its own, which signals for the server's group do not reach, and imports what it
needs only when there is something to do.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

TAKEN_AWAY = b"."  # a coordinator that ends by itself leaves nothing


@contextlib.contextmanager
def janitor(path: Path) -> Iterator[None]:
    """While the block lasts somebody sees to it that the socket at `path` goes, come what may."""
    process = subprocess.Popen(
        [sys.executable, "-m", "nodeserve.coordinator.janitor", str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        bufsize=0,
    )
    assert process.stdin is not None
    try:
        yield
    finally:
        with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
            pipe.write(TAKEN_AWAY)
        process.wait()


def main() -> None:
    if os.read(sys.stdin.fileno(), 1) == TAKEN_AWAY:
        return
    from nodeserve.coordinator.listener import remove_stale
    from nodeserve.errors import ConfigError
    from nodeserve.wire.channel import sweep_stale

    with contextlib.suppress(ConfigError):  # another server has it, or is about to
        remove_stale(Path(sys.argv[1]))
    sweep_stale()


if __name__ == "__main__":
    main()
