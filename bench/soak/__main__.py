"""Hours of everything at once: nothing may be lost, doubled, wrong or left behind.

    python -m bench.soak [--minutes N] [--seed N] [--kills PER_MINUTE] [--out FILE] [--figure FILE]

A node of simulated GPUs gets an open-loop mix of requests (traffic.py): greedy and sampled, stop
tokens and strings, long prompts, limits, priorities; clients that cancel, hang up, do not read or
send nonsense; bursts; and workers that are killed. What simulated workers answer is known, so every
stream is compared token by token, and every few seconds the node is audited. At the end every block
must be free, and descriptors, names in /dev/shm and memory as they were. The last line is JSON; the
exit code is 1 if anything was wrong.
"""

import argparse
import asyncio
import signal
import sys
import time
from pathlib import Path
from random import Random

from bench.nodes import running
from bench.report import emit, machine, save
from bench.soak.growth import MOST, growths
from bench.soak.ledger import Ledger
from bench.soak.node import Node
from bench.soak.picture import picture
from bench.soak.traffic import Traffic
from nodeserve import AsyncClient
from nodeserve.config import EngineConfig
from nodeserve.policy.profiles import profile_named
from nodeserve.worker.executor_sim import Tokens

RESULTS = Path(__file__).parents[1] / "results"
PROFILE = "llama-3.1-8b-h100"
KV_TOKENS = 24_000  # of each worker: little, so that memory runs short at times
END_S = 90.0  # for the last requests
TELL_S = 10.0
AUDIT_EVERY_S = 7.0


def main() -> None:
    args = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through what ends the node
    profile = profile_named(PROFILE)
    config = EngineConfig(
        layout=args.layout,
        device="sim",
        profile=PROFILE,
        kv_memory=KV_TOKENS * profile.kv_bytes_per_token,
        max_model_len=KV_TOKENS // 2,
        seed=args.seed,
        max_restarts=1 << 20,  # by chance one may be killed often
    )
    print(f"{args.layout} of {PROFILE}, {args.minutes:g} minutes at {args.rate:g} requests/s and")
    print(f"bursts, {args.kills:g} workers killed a minute, seed {args.seed}; {machine()}")
    ledger, began_s = Ledger(), time.perf_counter()
    with running(config) as socket:
        pid = asyncio.run(soak(str(socket), args, ledger))
    if names := list(_names(pid)):
        ledger.fault(f"left in /dev/shm: {', '.join(names)}")
    report(args, ledger, pid, time.perf_counter() - began_s)
    sys.exit(1 if ledger.num_faults else 0)


async def soak(socket: str, args: argparse.Namespace, ledger: Ledger) -> int:
    """Traffic, kills and looks, then the sums; the coordinator's process id."""
    async with AsyncClient(socket) as client:
        server = await client.server()
        node = Node(client, int(server["pid"]), ledger)
        tokens = Tokens(int(server["vocab_size"]), tuple(server["eos_token_ids"]))
        traffic = Traffic(socket, ledger, tokens, server, args.seed)
        await traffic.open()
        first = await node.workers()
        fds = node.num_fds([one["pid"] for one in first])
        seconds, random = 60.0 * args.minutes, Random(f"kills {args.seed}")
        watching = [
            asyncio.create_task(work)
            for work in (node.tell_seconds(), node.audit_now_and_then(AUDIT_EVERY_S), live(ledger))
        ]
        killing = []
        if args.kills:
            killing = [asyncio.create_task(node.kill_now_and_then(args.kills, random))]
        coming = asyncio.create_task(traffic.run(args.rate, seconds))
        await _first_to_end([coming, *watching, *killing], coming)
        for task in killing:
            task.cancel()
        await traffic.finish(END_S)
        await node.settle(len(first))
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, *killing, return_exceptions=True)
        if (now := node.num_fds([one["pid"] for one in await node.workers()])) != fds:
            ledger.fault(f"descriptors of coordinator and workers: {fds} before, {now} after")
        await traffic.close()
    return node.pid


async def _first_to_end(tasks: "list[asyncio.Task[None]]", traffic: "asyncio.Task[None]") -> None:
    """Until the traffic is over, or something of ours breaks."""
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()
    assert traffic in done


async def live(ledger: Ledger) -> None:
    """A line now and then for whoever watches."""
    began_s = time.perf_counter()
    while True:
        await asyncio.sleep(TELL_S)
        recent = ledger.seconds[-int(TELL_S) - 1 : -1]
        rss = [sum(one.rss_bytes.values()) for one in recent if one.rss_bytes]
        print(
            f"    {time.perf_counter() - began_s:6.0f} s: {ledger.num_open} open,"
            f" {sum(one.tokens for one in recent) / TELL_S:.0f} tokens/s,"
            f" {sum(one.refused for one in recent)} refused,"
            f" {sum(one.kills for one in ledger.seconds)} kills,"
            f" {(rss[-1] if rss else 0) / 2**20:.1f} MiB, {ledger.num_faults} faults",
            file=sys.stderr,
            flush=True,
        )


def report(args: argparse.Namespace, ledger: Ledger, pid: int, wall_s: float) -> None:
    """Figures, faults, picture, the last line."""
    grown = growths(ledger.seconds)
    for one in grown:
        if one.share > MOST:
            who = "coordinator" if one.pid == pid else f"worker process {one.pid}"
            ledger.fault(f"memory of the {who} grew by {one.share:.1%} in {one.seconds} s")
    ended = sum(one.ended for one in ledger.seconds)
    in_time = sum(one.in_time for one in ledger.seconds)
    num_tokens = sum(one.tokens for one in ledger.seconds)
    print("\n".join(f"{count:8,} {what}" for what, count in sorted(ledger.counts.items())))
    print(f"{num_tokens:8,} tokens compared, {ended:,} answers whole, {in_time:,} of them in time")
    for one in grown:
        who = "coordinator" if one.pid == pid else "worker"
        print(f"{one.share:8.2%} memory of {who} {one.pid}, {one.late / 2**20:.1f} MiB")
    print("\n".join(f"FAULT {words}" for words in ledger.faults) or "no faults")
    values = {
        "bench": "soak",
        "layout": args.layout,
        "minutes": args.minutes,
        "seed": args.seed,
        "rate": args.rate,
        "counts": dict(ledger.counts),
        "tokens": num_tokens,
        "answers": ended,
        "in_time": in_time,
        "kills": sum(one.kills for one in ledger.seconds),
        "memory_growth": {
            "coordinator" if one.pid == pid else str(one.pid): round(one.share, 5) for one in grown
        },
        "num_faults": ledger.num_faults,
        "faults": ledger.faults,
        "wall_s": round(wall_s, 1),
    }
    if args.out is not None:
        save(args.out, values)
    if args.figure is not None:
        title = f"{args.minutes:g} minutes of {args.layout}, {ledger.num_faults} faults"
        args.figure.write_text(picture(ledger.seconds, pid, title))
    emit(values)


def _names(pid: int) -> list[str]:
    return [one.name for one in Path("/dev/shm").iterdir() if f"nodeserve-{pid}-" in one.name]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--layout", default="4p4d")
    parser.add_argument("--rate", type=float, default=25.0, help="requests a second")
    parser.add_argument("--kills", type=float, default=2.0, metavar="PER_MINUTE")
    parser.add_argument("--out", type=Path, metavar="FILE", help="keep the result there")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the run there, as SVG")
    return parser.parse_args()


if __name__ == "__main__":
    main()
