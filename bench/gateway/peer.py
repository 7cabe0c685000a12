"""vLLM's API server, driven as our gateway is: python -m bench.gateway.peer [--streams 32]

Both stand before an engine in other processes and turn its tokens into server-sent events, one for
each stream and pass. vLLM computes the demo model for real (make peers), on whatever cores there
are, so only what its front process takes for a token is compared: CPU time, not speed. As many
streams with as many tokens go through our gateway, over a simulated node.
"""

import argparse
import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

import uvloop

from bench.gateway.bed import FIRST_PROMPT, bed, cpu_s, node
from bench.gateway.load import StreamClient
from bench.peers.contenders import vllm
from bench.peers.processes import Running, running
from bench.report import emit, machine

NUM_TOKENS = 200


async def drive(port: int, count: int, num_tokens: int) -> int:
    """So many streams at once; how many events came."""
    clients = [StreamClient(FIRST_PROMPT + number, num_tokens) for number in range(count)]
    for client in clients:
        await client.start(port)
    await asyncio.gather(*(client.done for client in clients))
    assert all(len(client.times) == num_tokens for client in clients), "a stream was cut short"
    return sum(client.num_events for client in clients)


async def theirs(peer: Running, count: int) -> dict[str, Any]:
    assert peer.options.url is not None
    port = int(peer.options.url.rpartition(":")[2])
    await drive(port, count, 20)  # what is compiled or loaded with the first
    front = [peer.process.pid]
    before_s, began_s = cpu_s(front), time.perf_counter()
    num_events = await drive(port, count, NUM_TOKENS)
    spent_s, num_tokens = cpu_s(front) - before_s, count * NUM_TOKENS
    return {
        "us_per_token": 1e6 * spent_s / num_tokens,
        "us_per_event": 1e6 * spent_s / num_events,
        "tokens_per_s": num_tokens / (time.perf_counter() - began_s),
    }


async def ours(folder: Path, count: int) -> dict[str, Any]:
    async with node(folder, "steady") as steady, bed(steady) as one:
        row = await one.streams(count, NUM_TOKENS)
    num_events = row["events_per_s"] / row["tokens_per_s"]  # a token
    return {
        "us_per_token": row["gateway_us_per_token"],
        "us_per_event": row["gateway_us_per_token"] / num_events,
        "tokens_per_s": row["tokens_per_s"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=32, help="vLLM computes 32 at once here")
    count = parser.parse_args().streams
    found: dict[str, Any] = {"streams": count, "machine": machine()}
    with tempfile.TemporaryDirectory(prefix="nodeserve-") as folder:
        with running(vllm(), Path(folder)) as peer:
            found["vllm"] = uvloop.run(theirs(peer, count))
        found["nodeserve"] = uvloop.run(ours(Path(folder), count))
    for name in ("vllm", "nodeserve"):
        row = found[name]
        print(
            f"{name:9s} {row['us_per_token']:6.1f} us of CPU a token, {row['us_per_event']:6.1f} an"
            f" event, at {row['tokens_per_s']:,.0f} tokens/s"
        )
    emit({"bench": "gateway.peer", **found})


if __name__ == "__main__":
    main()
