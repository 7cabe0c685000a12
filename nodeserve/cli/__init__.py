"""The command line. Exit codes: 0 done, 1 a typed error (one line on stderr), 2 wrong usage."""

from typing import Any

import click

from nodeserve import __version__
from nodeserve.cli.bench import bench
from nodeserve.cli.doctor.command import doctor
from nodeserve.cli.experts import experts
from nodeserve.cli.gateway import gateway
from nodeserve.cli.launch import start
from nodeserve.cli.plan import plan
from nodeserve.cli.profile import profile
from nodeserve.cli.show import status, stop
from nodeserve.cli.simulate import simulate
from nodeserve.cli.talk import chat, complete
from nodeserve.cli.top.command import top
from nodeserve.cli.trace import trace
from nodeserve.errors import NodeServeError
from nodeserve.wire.messages import PROTOCOL_VERSION


class Commands(click.Group):
    """Turns typed errors into one line; anything else is our bug and keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except NodeServeError as error:
            raise click.ClickException(str(error)) from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Serve a language model on this machine, prefill and decode apart."""


@main.command()
def version() -> None:
    """Print the version."""
    click.echo(f"nodeserve {__version__} (client protocol {PROTOCOL_VERSION})")


for command in (
    *(start, gateway, complete, chat, status, top, stop),
    *(doctor, simulate, bench, plan, profile, trace, experts),
):
    main.add_command(command)
