"""Chat templates that mean harm: a typed error, soon, and the next conversation is written."""

import gc
import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nodeserve.errors import InvalidRequest, ModelError
from nodeserve.text import chat
from nodeserve.text.chat import ChatTemplate

MESSAGES = [{"role": "user", "content": "x"}]
ATTACK = "{% if messages[0].content == 'go' %}{{ATTACK}}{% else %}fine{% endif %}"


@pytest.fixture(autouse=True)
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "TIME_S", 0.2)
    monkeypatch.setattr(chat, "MEMORY_BYTES", 64 << 20)
    monkeypatch.setattr(chat, "MAX_CHARACTERS", 1 << 20)


def render(template: ChatTemplate, content: str = "x") -> str:
    return template.render([{"role": "user", "content": content}], True, {})


LOOP = "{% for i in range(99999) %}"
ENDLESS = {
    "loops": LOOP * 3 + "{% endfor %}" * 3,
    "power": "{% set n = 999999999 * messages | length %}{{ n ** n }}",
    "macro": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
    "{{ m(60) }}",
}
HUGE = {
    "product": "{{ 'a' * 10 ** 12 }}",
    "doubling": "{% set n = namespace(x='a' * 99) %}{% for i in range(99) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "padding": "{{ 'a'.ljust(10 ** 10) }}",
    "format": "{{ '%999999999d' % 1 }}",
    "format spec": "{{ '{:>9999999999}'.format(1) }}",
    "list": "{{ ([1] * 10 ** 9) | length }}",
    "replace": "{{ ('a' * 99999).replace('', 'a' * 99999) | length }}",
    "output": "{{ 'a' * 1048577 }}",
}
BROKEN = {
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "format string": "{{ '{0.__class__.__mro__}'.format('') }}",
    "append": "{{ messages.append(1) }}",
    "include": "{% include '/etc/passwd' %}",
    "division": "{{ 1 / 0 }}",
    "digits": "{{ (10 * messages | length) ** 5000 }}",
    "exception": "{{ raise_exception('x' * 10000) }}",
}


@pytest.mark.parametrize("attack", ENDLESS.values(), ids=ENDLESS.keys())
def test_what_never_ends_is_ended(attack: str) -> None:
    template = ChatTemplate(ATTACK.replace("{{ATTACK}}", attack), {})
    for _ in range(2):
        assert render(template) == "fine"
        with pytest.raises(ModelError, match="did not end in 0.2 s of computing"):
            render(template, "go")


@pytest.mark.parametrize("attack", (HUGE | BROKEN).values(), ids=(HUGE | BROKEN).keys())
def test_what_grows_or_is_not_allowed_is_refused(attack: str) -> None:
    template = ChatTemplate(ATTACK.replace("{{ATTACK}}", attack), {})
    for _ in range(2):
        assert render(template) == "fine"
        with pytest.raises(InvalidRequest, match="the chat template refuses") as caught:
            render(template, "go")
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "source",
    [
        "{{ " + "(" * 100_000,
        "{{ " + "[" * 5000 + "]" * 5000 + " }}",
        "{{ " + "-" * 100_000 + "1 }}",
        "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
        "{% for i in x %}" * 30 + "{% endfor %}" * 30,
        "{{ 9 ** (9 ** 9) }}",  # folded when it is compiled
        "{{ 'a' * 10 ** 12 }}",
        "{% endfor %}",
        "{% extends 'x' %}",
    ],
    ids=range(9),
)
def test_what_cannot_be_compiled_is_a_typed_error(source: str) -> None:
    with pytest.raises((ModelError, InvalidRequest), match="chat template"):
        render(ChatTemplate(source, {}))


def test_a_template_may_be_long_and_a_conversation_too() -> None:
    template = ChatTemplate("{{ messages[0].content }}" + "x" * 100_000, {})
    content = "\N{GRINNING FACE}\ud800é" * 100_000  # a lone surrogate is for `encode` to refuse
    assert render(template, content) == content + "x" * 100_000


def test_a_conversation_that_no_model_can_take_is_not_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chat, "MAX_REQUEST_CHARACTERS", 1000)
    with pytest.raises(InvalidRequest, match="at most 1000 are taken"):
        render(ChatTemplate("fine", {}), "x" * 1000)


def test_the_environment_stays_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "secret")
    template = ChatTemplate("fine", {})
    render(template)
    assert template._renderer is not None
    environment = Path(f"/proc/{template._renderer._process.pid}/environ").read_bytes()
    assert b"secret" not in environment


def test_what_json_does_not_have_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="must be as in JSON"):
        ChatTemplate("{{ x }}", {}).render(MESSAGES, True, {"x": object()})


def test_a_process_that_is_gone_is_replaced() -> None:
    template = ChatTemplate("fine", {})
    assert render(template) == "fine"
    assert template._renderer is not None
    process = template._renderer._process
    os.kill(process.pid, signal.SIGINT)  # the terminal's: it goes on
    assert render(template) == "fine" and template._renderer._process is process
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert render(template) == "fine" and template._renderer._process is not process


def test_a_process_ends_with_its_template() -> None:
    template = ChatTemplate("fine", {})
    render(template)
    assert template._renderer is not None
    process = template._renderer._process
    del template
    gc.collect()
    assert process.returncode == -signal.SIGKILL


def test_a_process_ends_with_whoever_started_it() -> None:
    script = (
        "import os; from nodeserve.text.chat import ChatTemplate; t = ChatTemplate('x', {});"
        "t.render([{'role': 'user', 'content': 'x'}], True, {});"
        "print(t._renderer._process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    try:
        descriptor = os.pidfd_open(int(done.stdout))
    except ProcessLookupError:
        return
    select.select([descriptor], [], [])  # readable once it has ended
    os.close(descriptor)


def test_threads_take_turns() -> None:
    template = ChatTemplate("{{ messages[0].content }}", {})
    wrong: list[str] = []

    def ask(name: str) -> None:
        wrong.extend(name for _ in range(50) if render(template, name) != name)

    threads = [threading.Thread(target=ask, args=(f"{i}" * 1000,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_whoever_breaks_out_of_the_sandbox_finds_nothing(tmp_path: Path) -> None:
    """No file, no socket and, for all but root, no process."""
    script = """
import os, socket, sys
from nodeserve.text.renderer import confine
confine(64 << 20)
for attempt in (lambda: open(sys.argv[1]), lambda: open("/etc/passwd"), socket.socket, os.pipe):
    try:
        attempt()
    except OSError as error:
        print(error.errno)
try:
    bytearray(128 << 20)
except MemoryError:
    print("memory")
"""
    (tmp_path / "file").write_text("secret")
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "file")], capture_output=True, check=True
    )
    assert done.stdout.split() == [b"24"] * 4 + [b"memory"]
