"""nodeserve beside what its users would run instead on a CPU machine.

    python -m bench.peers [--only WORD ...] [--rounds N] [--minutes M] [--smoke]

One trace, one client, the same weights and cores. One server lives at a time; each is started,
warmed up, measured and stopped in turn, and the order of the rounds alternates. `make peers`
installs them; those that are not there are rows with a reason. The last line is JSON.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from bench.peers.contenders import ROOT, Contender, everyone
from bench.peers.life import Life, Protocol, live
from bench.peers.smoke import smoke
from bench.peers.summary import row_of, to_json, verdict_json, verdicts
from bench.peers.table import lines, picture, verdict_lines
from bench.report import emit, save

RESULTS = ROOT / "bench/results"
MINUTES, ROUNDS = 28.0, 2
RUNGS = 9  # of a life: about so long lasts all of it, the closed loops and the start included
LEAST_RUNG_S, MOST_RUNG_S = 4.0, 60.0
BUSY = 0.7  # load, averaged over a minute
MOST_OF_SHARE = 1.5  # some lives are shorter than their share
OUT_OF_TIME = "no time was left for it (--minutes)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="servers with these in the name")
    parser.add_argument("--rounds", type=int, metavar="N", help=f"{ROUNDS}; alternating order")
    parser.add_argument("--minutes", type=float, default=MINUTES, metavar="M", help="for all")
    parser.add_argument("--smoke", action="store_true", help="the harness alone: seconds")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON, and the figure beside it")
    args = parser.parse_args()
    args.rounds = args.rounds or (1 if args.smoke else ROUNDS)
    if args.rounds < 1 or args.minutes <= 0.0:
        parser.error("--rounds needs at least 1, --minutes a number above 0")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through all that ends processes
    if args.smoke:
        contenders, protocol = smoke()
    else:
        contenders = chosen(everyone(), args.only)
        num_lives = args.rounds * sum(one.missing is None for one in contenders)
        share_s = 60.0 * args.minutes / max(1, num_lives)
        protocol = Protocol(rung_s(share_s), life_s=MOST_OF_SHARE * share_s)
        if args.only is None:
            args.out = args.out or RESULTS / "peers.json"
    if not contenders:
        parser.error(f"no server is named like {' '.join(args.only)}")
    report(contenders, protocol, args.rounds, args.minutes, args.out)


def chosen(contenders: Sequence[Contender], words: Sequence[str] | None) -> list[Contender]:
    """Those with one of the words in their names; all without words."""
    return [
        one
        for one in contenders
        if words is None or any(word.lower() in one.name.lower() for word in words)
    ]


def rung_s(share_s: float) -> float:
    """How long each rate is held in a life of `share_s`."""
    return min(MOST_RUNG_S, max(LEAST_RUNG_S, share_s / RUNGS))


def orders(contenders: Sequence[Contender], num_rounds: int) -> Iterator[tuple[int, Contender]]:
    """A B C, C B A, A B C, with the number of the round: what drifts meets all alike."""
    for number in range(num_rounds):
        for contender in contenders if number % 2 == 0 else reversed(contenders):
            yield number, contender


def report(
    contenders: Sequence[Contender],
    protocol: Protocol,
    num_rounds: int,
    minutes: float,
    out: Path | None,
) -> None:
    """Measure all of them, print and keep what was found."""
    began_s = time.perf_counter()
    busy = os.getloadavg()[0]
    limits = " ".join(protocol.limits)
    title = f"{protocol.source.workload}, lengths / {protocol.source.divisor:g}, {limits}"
    print(f"{title}; {protocol.rung_s:.0f} s for each rate", flush=True)
    if busy > BUSY:
        print(f"note: the machine is busy (load {busy:.1f}): measure when nothing else runs")
    lives: dict[str, list[Life]] = {one.name: [] for one in contenders}
    with tempfile.TemporaryDirectory(prefix="nodeserve-peers-") as folder:
        for number, contender in orders(contenders, num_rounds):
            # Requests of its own for each round, the same for all in it.
            source = replace(protocol.source, seed=number)
            lives[contender.name].append(
                one_life(
                    contender,
                    replace(protocol, source=source),
                    Path(folder),
                    began_s + 60.0 * minutes,
                )
            )
    rows = [row_of(one, lives[one.name], protocol) for one in contenders]
    found = verdicts(rows)
    print("", *lines(rows, protocol.common_rate), "", *verdict_lines(found), sep="\n", flush=True)
    values = {
        "bench": "peers",
        "workload": protocol.source.workload,
        "scale_lengths": protocol.source.divisor,
        "slo": limits,
        "rounds": num_rounds,
        "rung_s": round(protocol.rung_s, 1),
        "load_before": round(busy, 2),
        "servers": [to_json(row) for row in rows],
        "aims": [verdict_json(one) for one in found],
        "wall_s": round(time.perf_counter() - began_s, 1),
    }
    if out:
        save(out, values)
        if any(row.rungs for row in rows):
            out.with_suffix(".svg").write_text(picture(rows, title))
    emit(values)


def one_life(contender: Contender, protocol: Protocol, folder: Path, until_s: float) -> Life:
    """Told as it goes on."""
    print(f"\n{contender.name}", flush=True)
    if contender.missing is None and time.perf_counter() > until_s:
        life = Life(failure=OUT_OF_TIME)
    else:
        life = live(contender, protocol, folder, lambda text: print(f"  {text}", flush=True))
    if life.failure:
        print(f"  {life.failure}", flush=True)
    return life


if __name__ == "__main__":
    main()
