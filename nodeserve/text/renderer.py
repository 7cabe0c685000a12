"""The process in which a chat template runs: a program of its own, of jinja2 and nothing of ours.

A template comes with a model and is not trusted. jinja2's sandbox keeps it from our objects, but
not from running for ever or from filling the memory, and no check inside one interpreter can: a
single product of two numbers may take an hour. So the kernel holds this process to a time and to
memory for each rendering, and to no further file, process or byte on a disk. Whoever started it
(`chat.py`) sees it end and says so.

It reads frames from its input (4 bytes of length, then UTF-8): first the template, then the
variables of each rendering as JSON. It writes one frame for each, the template's included, which
begins with a letter: t (the text), r (the template refuses), i (the template is invalid).
"""

import codecs
import importlib
import json
import resource
import signal
import struct
import sys
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Any, NoReturn, TypeVar

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

LENGTH = struct.Struct("<I")
TEXT, REFUSES, INVALID = b"t", b"r", b"i"
LATER = ("html", "jinja2.debug", "pprint", "textwrap")  # what jinja2 and markupsafe import in use
MAX_ERROR_CHARACTERS = 500
Result = TypeVar("Result")


class Generation(Extension):
    """`{% generation %}` marks an answer for training; here it is only its contents."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> jinja2.Environment:
    """The sandbox, with the helpers that model authors expect."""
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", Generation],
    )
    sandbox.filters["tojson"] = _to_json
    sandbox.globals["raise_exception"] = _raise_exception
    sandbox.globals["strftime_now"] = _strftime_now
    return sandbox


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own escapes HTML, which no prompt wants."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def confine(memory_bytes: int) -> None:
    """From here on: so much more memory, and nothing new from the system. For good."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's, meant for who started us
    for name in LATER:
        importlib.import_module(name)
    codecs.lookup("unicode_escape")
    datetime.now().strftime("%Y")  # reads the time zone's file
    with open("/proc/self/statm", "rb") as file:
        used_bytes = int(file.read().split()[0]) * resource.getpagesize()
    limits = {
        resource.RLIMIT_AS: used_bytes + memory_bytes,
        resource.RLIMIT_NOFILE: 0,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in limits.items():
        resource.setrlimit(kind, (most, most))


def read_frame() -> str | None:
    """The next one; None at the end of the input."""
    head = sys.stdin.buffer.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (size,) = LENGTH.unpack(head)
    data = sys.stdin.buffer.read(size)
    return data.decode("utf-8", "surrogatepass") if len(data) == size else None


def write_frame(kind: bytes, text: str) -> None:
    data = kind + text.encode("utf-8", "surrogatepass")
    sys.stdout.buffer.write(LENGTH.pack(len(data)) + data)
    sys.stdout.buffer.flush()


def bounded(action: Callable[[], Result], time_s: float) -> tuple[Result | None, str]:
    """What `action` gives, or None and why; past the time the kernel ends the process."""
    signal.setitimer(signal.ITIMER_PROF, time_s)
    try:
        return action(), ""
    except MemoryError:
        return None, "it takes too much memory"
    except Exception as error:  # noqa: BLE001  # a template may raise anything
        return None, (str(error) or type(error).__name__)[:MAX_ERROR_CHARACTERS]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)


def render(template: jinja2.Template, variables: str, max_characters: int) -> str:
    text = template.render(json.loads(variables))
    if len(text) > max_characters:
        raise ValueError(f"its text has {len(text)} characters, at most {max_characters}")
    return text


def main() -> None:
    time_s, memory_bytes, max_characters = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    sandbox = environment()
    confine(memory_bytes)
    source = read_frame()
    if source is None:
        return
    template, problem = bounded(partial(sandbox.from_string, source), time_s)
    write_frame(TEXT if template else INVALID, problem)
    while template and (variables := read_frame()) is not None:
        text, problem = bounded(partial(render, template, variables, max_characters), time_s)
        write_frame(REFUSES if text is None else TEXT, problem if text is None else text)


if __name__ == "__main__":
    main()
