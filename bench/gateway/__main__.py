"""What one gateway process sustains and adds: python -m bench.gateway [--smoke]

Real gateway, real coordinator, simulated workers whose passes take a given time. The gateway has a
core for itself, everything else shares the other (bench/gateway/bed.py), and each reading says what
a token takes of both and whose core was full. Four workers send a token for each stream in 25 ms,
3 % more or less, so that they step apart:

- streams: tokens/s, CPU time a token, and what the gateway adds to a token's way from the socket to
  the HTTP client (bench/gateway/tap.py); over TCP, and over a Unix socket, which shows what of it
  is the kernel's TCP;
- in step: the same where passes never vary, so that all streams have their tokens at once: the last
  one waits for the writing of all others;
- flat out: with passes of 5 ms, more than it can follow: tokens that wait are joined;
- two processes, on the same core: whether they share work, which would cost them more than one;
- requests: one-token completions one after the other on 64 connections.
"""

import argparse
import contextlib
import tempfile
from pathlib import Path
from typing import Any

import uvloop

from bench.gateway.bed import CORES, bed, node
from bench.processes import awake
from bench.report import emit, machine, save

AIM_TOKENS_PER_S = 20_000
AIM_ADDED_MS = 2.0


async def measure(folder: Path, smoke: bool) -> dict[str, Any]:
    counts, num_tokens = ([4], 60) if smoke else ([1, 64, 512], 400)
    found: dict[str, Any] = {"streams": []}
    async with node(folder, "apart") as apart:
        async with bed(apart) as tcp:
            for count in counts:
                found["streams"].append(told("TCP", await tcp.streams(count, num_tokens)))
        async with bed(apart, unix=True) as unix:
            found["unix"] = told("Unix", await unix.streams(counts[-1], num_tokens))
    async with node(folder, "in step") as together, bed(together) as tcp:
        found["in_step"] = told("TCP, in step", await tcp.streams(counts[-1], num_tokens))
    async with node(folder, "swift") as swift:
        async with bed(swift) as one:
            found["flat_out"] = told("flat out", await one.streams(counts[-1], 2 * num_tokens))
            row = await one.requests(8 if smoke else 64, 5 if smoke else 100)
            found["requests"] = row
        async with bed(swift, workers=2) as two:
            found["two"] = told("two, flat out", await two.streams(counts[-1], 2 * num_tokens))
    print(
        f"{row['connections']:4d} connections: {row['requests_per_s']:,.0f} requests/s,"
        f" {row['gateway_us_per_request']:.0f} us of CPU each; limit: {row['limit']}"
    )
    return found


def told(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """Print a reading of streams."""
    cost = "/".join(f"{row[f'{who}_us_per_token']:.1f}" for who in ("gateway", "node", "client"))
    print(
        f"{row['streams']:4d} streams, {name:13s} {row['tokens_per_s']:7,.0f} tokens/s"
        f" ({row['events_per_s']:,.0f} events/s); us a token of gateway/node/client: {cost};"
        f" busy {row['gateway_busy']:.0%}, the load {row['load_busy']:.0%}; limit: {row['limit']};"
        f" at a full core {row['full_core_tokens_per_s']:,.0f} tokens/s;"
        f" added P50 {row['p50_added_ms']:.2f} ms, P99 {row['p99_added_ms']:.2f}",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a tiny run: does it work?")
    parser.add_argument("--out", type=Path, metavar="FILE", help="keep the result there")
    args = parser.parse_args()
    print(
        f"aims: {AIM_TOKENS_PER_S:,} tokens/s of one process; P50 added under {AIM_ADDED_MS:g} ms\n"
    )
    where = machine()  # before this process keeps to one core
    with contextlib.ExitStack() as owner:
        folder = owner.enter_context(tempfile.TemporaryDirectory(prefix="nodeserve-"))
        # Waking a core that halts would be part of each write; a tiny run leaves cores to others.
        for core in () if args.smoke else {CORES[0], CORES[-1]}:
            owner.enter_context(awake(core))
        found = uvloop.run(measure(Path(folder), args.smoke))
    aims = {"aim_tokens_per_s": AIM_TOKENS_PER_S, "aim_p50_added_ms": AIM_ADDED_MS}
    named = {"bench": "gateway", "machine": where, **aims, **found}
    if args.out is not None:
        save(args.out, named)
    emit(named)


if __name__ == "__main__":
    main()
