"""Chat templates: rendered in a process of their own (`renderer.py`), which the kernel bounds.

A template comes with a model and is not trusted; messages come with a request and are checked
here, so that a template sees dictionaries with a role and text.
"""

import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from signal import Signals
from typing import Any

from nodeserve.errors import InvalidRequest, ModelError
from nodeserve.types import shown

Message = Mapping[str, Any]

TIME_S = 2.0  # of computing, for one rendering; a large conversation takes some milliseconds
MEMORY_BYTES = 512 << 20  # beside what jinja2 itself takes
MAX_CHARACTERS = 16 << 20  # of a rendered prompt
MAX_REQUEST_CHARACTERS = 6 * MAX_CHARACTERS  # of messages and variables as JSON
PATIENCE_S = 60.0  # by the clock: the process may get no core, or its pages from a disk
END_S = 5.0  # for a process that has closed its pipes
_PROGRAM = Path(__file__).with_name("renderer.py")
# What Python needs to start and to write dates; the rest of it is nothing for a template.
_ENVIRONMENT = ("PYTHONHOME", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "LC_TIME", "TZ")
_LENGTH_BYTES = 4
_MAX_REPLY_BYTES = 4 * MAX_CHARACTERS + 1


class ChatTemplate:
    """One template; threads may share it. Its process starts with the first rendering."""

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        self._source = source
        self._tokens = dict(tokens)
        self._renderer: _Renderer | None = None
        self._lock = threading.Lock()

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool, variables: dict[str, Any]
    ) -> str:
        """The conversation as the template writes it. InvalidRequest if it refuses the messages,
        ModelError if it is no template or goes beyond its bounds."""
        conversation = checked_messages(messages)
        given = {
            **self._tokens,
            **variables,
            "messages": conversation,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            request = json.dumps(given)
        except (TypeError, ValueError, RecursionError) as problem:
            raise InvalidRequest(f"messages and variables must be as in JSON: {problem}") from None
        if len(request) > MAX_REQUEST_CHARACTERS:
            raise InvalidRequest(
                f"the conversation has {len(request)} characters as JSON, at most"
                f" {MAX_REQUEST_CHARACTERS} are taken"
            )
        with self._lock:
            return self._running().render(request)

    def _running(self) -> "_Renderer":
        if self._renderer is None or not self._renderer.usable:
            self._renderer = _Renderer(self._source)
        return self._renderer


class _Renderer:
    """One process, for one template."""

    def __init__(self, source: str) -> None:
        limits = (TIME_S, MEMORY_BYTES, MAX_CHARACTERS)
        self._pid = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM), *map(str, limits)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        )
        assert self._process.stdout is not None
        self._poll = select.poll()
        self._poll.register(self._process.stdout, select.POLLIN)
        self._end = weakref.finalize(self, _end, self._process, self._pid)
        kind, text = self._ask(source)
        if kind == "i":
            self._end()
            raise ModelError(f"the model's chat template is not valid: {text}")

    @property
    def usable(self) -> bool:
        """False once it has ended, and in a fork of who started it."""
        return self._pid == os.getpid() and self._end.alive and self._process.poll() is None

    def render(self, variables: str) -> str:
        kind, text = self._ask(variables)
        if kind == "r":
            raise InvalidRequest(f"the chat template refuses these messages: {text}")
        return text

    def _ask(self, text: str) -> tuple[str, str]:
        data = text.encode("utf-8", "surrogatepass")
        try:
            self._write(len(data).to_bytes(_LENGTH_BYTES, "little") + data)
            answer = self._answer()
        except BaseException:
            self._end()
            raise
        return answer[:1], answer[1:]

    def _write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        view = memoryview(data)
        try:
            while view:
                view = view[self._process.stdin.write(view) :]
        except BrokenPipeError:
            raise self._ended() from None

    def _answer(self) -> str:
        give_up_s = time.monotonic() + PATIENCE_S
        size = int.from_bytes(self._read(_LENGTH_BYTES, give_up_s), "little")
        if not 1 <= size <= _MAX_REPLY_BYTES:
            raise ModelError(f"the model's chat template wrote {size} bytes: it cannot be used")
        return self._read(size, give_up_s).decode("utf-8", "surrogatepass")

    def _read(self, num_bytes: int, give_up_s: float) -> bytes:
        assert self._process.stdout is not None
        file, data = self._process.stdout, bytearray()
        while len(data) < num_bytes:
            if not self._poll.poll(1e3 * max(0.0, give_up_s - time.monotonic())):
                raise ModelError(f"the model's chat template did not end in {PATIENCE_S:g} s")
            if not (part := file.read(num_bytes - len(data))):
                raise self._ended()
            data += part
        return bytes(data)

    def _ended(self) -> ModelError:
        try:
            code = self._process.wait(timeout=END_S)
        except subprocess.TimeoutExpired:  # it only closed its pipes
            self._process.kill()
            code = self._process.wait()
        if code == -Signals.SIGPROF:
            return ModelError(
                f"the model's chat template did not end in {TIME_S:g} s of computing: it cannot be"
                " used; send a prompt instead"
            )
        return ModelError(f"the process of the model's chat template ended with code {code}")


def _end(process: "subprocess.Popen[bytes]", owner_pid: int) -> None:
    if os.getpid() != owner_pid:  # in a fork
        return
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    process.wait()


def checked_messages(messages: object) -> list[dict[str, Any]]:
    """The messages with text parts joined; InvalidRequest names what is wrong."""
    if not isinstance(messages, list | tuple) or not messages:
        raise InvalidRequest("messages must be a list of at least one message")
    return [_checked_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _checked_message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequest(
            f"{where} must be an object with role and content, got {shown(message)}"
        )
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequest(f"{where}.role must be a string such as 'user', got {shown(role)}")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return {"content": None, **message}
    return {**message, "content": _text(content, f"{where}.content")}


def _text(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise InvalidRequest(
            f"{where} must be a string or a list of text parts, got {shown(content)}"
        )
    return "\n".join(_part(part, f"{where}[{i}]") for i, part in enumerate(content))


def _part(part: object, where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind != "text":
        raise InvalidRequest(
            f"{where}.type must be 'text', got {shown(kind)}: only text is supported"
        )
    text = part["text"] if isinstance(part, Mapping) and "text" in part else None
    if not isinstance(text, str):
        raise InvalidRequest(f"{where}.text must be a string, got {shown(text)}")
    return text
