"""`nodeserve complete` and `nodeserve chat`."""

import json
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict
from typing import Any, TypeVar

import click

from nodeserve.cli.settings import given, sampling_options
from nodeserve.client import Chunk, Client
from nodeserve.errors import ConnectionLost, NodeServeError
from nodeserve.types import Timings

CONNECT_TIMEOUT_S = 10.0
INTERRUPTED = 130  # what a shell gives for Ctrl-C

Command = TypeVar("Command", bound=Callable[..., Any])


def socket_option(command: Command) -> Command:
    return click.option("--socket", help="Path of the server's Unix socket.")(command)


def stop_option(command: Command) -> Command:
    text = "End the answer before this text; may be given several times."
    return click.option("--stop", multiple=True, help=text)(command)


@click.command()
@click.argument("prompt")
@socket_option
@sampling_options
@stop_option
@click.option("--stream/--no-stream", default=True, help="Print tokens as they come.")
@click.option("--timings", is_flag=True, help="Say on stderr where the time went.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with all there is.")
def complete(
    prompt: str,
    socket: str | None,
    stop: tuple[str, ...],
    stream: bool,
    timings: bool,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Continue the text PROMPT ("-" reads it from stdin)."""
    if prompt == "-":
        prompt = sys.stdin.read()
    options = {**given(sampling), "stop": stop}
    with Client(socket, connect_timeout_s=CONNECT_TIMEOUT_S) as client:
        try:
            if as_json:
                click.echo(json.dumps(asdict(client.generate(prompt, **options))))
                return
            if stream:
                spent = say(client.generate(prompt, stream=True, **options))
                click.echo()
            else:
                done = client.generate(prompt, **options)
                click.echo(done.text)
                spent = done.timings
            if timings and spent is not None:
                click.echo(timeline(spent), err=True)
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)


def say(chunks: Generator[Chunk, None, None]) -> Timings | None:
    """Print an answer as it comes; what its last chunk says of the time."""
    timings = None
    for chunk in chunks:
        click.echo(chunk.text, nl=False)
        timings = chunk.timings
    return timings


def timeline(timings: Timings) -> str:
    """The stages of a request in milliseconds, in two lines."""
    stages = {
        "in the queue": timings.scheduler_wait_s,
        "to the worker": timings.transit_s,
        "waiting there": timings.device_wait_s,
        "prefill": timings.prefill_s,
        "back": timings.return_s,
    }
    parts = " + ".join(f"{1e3 * seconds:.1f} {words}" for words, seconds in stages.items())
    handoff_s = timings.handoff_wait_s + timings.handoff_s
    return (
        f"first token {1e3 * timings.ttft_s:.1f} ms = {parts}\n"
        f"then {1e3 * timings.decode_s:.1f} ms, of them {1e3 * handoff_s:.1f} handoff;"
        f" workers {timings.prefill_worker} and {timings.decode_worker},"
        f" {timings.num_preemptions} preemptions, left behind {timings.num_rounds} times"
    )


@click.command()
@socket_option
@click.option("--system", help="What the model is told before the conversation.")
@sampling_options
@stop_option
def chat(socket: str | None, system: str | None, stop: tuple[str, ...], **sampling: Any) -> None:
    """Talk with the model, turn by turn.

    /reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C ends an answer. With input from
    a pipe every line is a turn.
    """
    with Client(socket, connect_timeout_s=CONNECT_TIMEOUT_S) as client:
        about = client.server()
        people = sys.stdin.isatty()
        if people:
            click.echo(f"{about['model']}: /reset forgets, /exit leaves, Ctrl-C ends an answer")
        conversation = Conversation(client, system, {**given(sampling), "stop": stop})
        for line in typed_lines() if people else sys.stdin:
            text = line.strip()
            if text == "/exit":
                break
            if text == "/reset":
                conversation.reset()
            elif text.startswith("/"):
                click.echo(f"unknown command {text}: use /reset or /exit", err=True)
            elif text:
                conversation.turn(text)


class Conversation:
    """The messages so far."""

    def __init__(self, client: Client, system: str | None, options: dict[str, Any]) -> None:
        self._client = client
        self._system = system
        self._options = options
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def turn(self, text: str) -> None:
        """Ask and answer. What was said before Ctrl-C stays, a turn that failed does not."""
        self.messages.append({"role": "user", "content": text})
        answer: list[str] = []
        try:
            for chunk in self._client.chat(self.messages, stream=True, **self._options):
                answer.append(chunk.text)
                click.echo(chunk.text, nl=False)
            click.echo()
        except KeyboardInterrupt:
            click.echo(" [cancelled]")
        except ConnectionLost:
            raise
        except NodeServeError as error:
            click.echo(f"\nError: {error}", err=True)
            answer.clear()
        if answer:
            self.messages.append({"role": "assistant", "content": "".join(answer)})
        else:
            self.messages.pop()


def typed_lines() -> Iterator[str]:
    """Lines from a person, with editing and history; Ctrl-C drops the line, Ctrl-D ends."""
    import readline  # noqa: F401 -- `input` uses it once it is loaded

    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            click.echo()
        except EOFError:
            click.echo()
            return
