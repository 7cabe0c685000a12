"""One gateway process: serves on an inherited socket until told to stop, or until nobody keeps it.

Its standard input is a pipe from the process that keeps it. The pipe ends with that process,
however it ends, so a gateway never outlives the server that it belongs to.
"""

import asyncio
import gc
import logging
import os
import signal
import socket
import sys

import uvicorn
import uvloop

from nodeserve.gateway.app import make_app
from nodeserve.gateway.connection import HttpConnection
from nodeserve.gateway.settings import GatewaySettings
from nodeserve.gateway.spans import Spans, spans_from
from nodeserve.log import about, logger

KEEP_ALIVE_S = 75  # longer than load balancers keep theirs: it is they who close


def serve(listener: socket.socket, settings: GatewaySettings) -> None:
    """Blocks. SIGTERM and SIGINT let running answers end, for `stop_timeout_s` at most."""
    for number in (signal.SIGTERM, signal.SIGINT):
        # It has its own handlers while it serves and raises what they caught again afterwards.
        signal.signal(number, lambda *_: None)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(make_server(settings), listener))


def make_server(settings: GatewaySettings, spans: Spans | None = None) -> uvicorn.Server:
    """`spans` None: as the environment asks for."""
    # Its warnings are of requests that are none: a line for each would be for strangers to write.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    config = uvicorn.Config(
        make_app(settings, spans or spans_from(os.environ)),
        http=HttpConnection,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=settings.stop_timeout_s,
    )
    return uvicorn.Server(config)


async def _serve(server: uvicorn.Server, listener: socket.socket) -> None:
    loop, keeper = asyncio.get_running_loop(), sys.stdin.fileno()

    def on_input() -> None:
        if not os.read(keeper, 1):
            loop.remove_reader(keeper)
            extra = about("keeper_gone")
            logger.warning("the gateway's keeper is gone: stopping", extra=extra)
            server.should_exit = True

    loop.add_reader(keeper, on_input)
    gc.collect()
    gc.freeze()  # all that is imported: no collection, for which streams would wait, looks again
    await server.serve(sockets=[listener])
    loop.remove_reader(keeper)
