"""`nodeserve gateway` as a process."""

import subprocess
import sys
from pathlib import Path

import openai

COMMAND = (sys.executable, "-m", "nodeserve", "gateway", "--http", "127.0.0.1:0")


class Gateways:
    """`nodeserve gateway` and its children."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith("serving http://127.0.0.1:"), line + process.stderr.read()
        self.url = line.split()[1]

    def pids(self) -> list[int]:
        pid = self.process.pid
        tasks = Path(f"/proc/{pid}/task").iterdir()  # its threads start the children
        return [int(one) for task in tasks for one in (task / "children").read_text().split()]

    def until_log(self, words: str) -> None:
        """Read what it says up to a line with these words; the test's timeout bounds it."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if words in line:
                return
        raise AssertionError(f"it ended and never said {words!r}")

    def client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)
