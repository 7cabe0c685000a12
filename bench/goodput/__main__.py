"""Goodput on this machine: phases apart or together, and whether the plan knew which.

    python -m bench.goodput [--profile FILE] [--slo TTFT,TPOT ...] [--out FILE] [--figure FILE]

Measures a profile of the demo model on this machine's cores (`nodeserve profile`), asks `nodeserve
plan` for the best mixed and the best split layout under each of three SLOs, and starts both as the
plan's command would. One trace for all: `chat` with lengths divided so that a prompt takes a
fraction of a second here. Attainment is measured at rates around the planned goodput, one layout
after the other, until it is known closely enough where it falls below 90 %. Nothing else should run
meanwhile. The last line is JSON.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.goodput import live, tables
from bench.goodput.arms import Duel, plan_duel
from bench.report import emit, save
from nodeserve import profile_store
from nodeserve.plan.goodput import Slo
from nodeserve.plan.requests import Source
from nodeserve.policy.profile import Profile

RESULTS = Path(__file__).parents[1] / "results"
DIVISOR = 8.0  # of the lengths of `chat`: 144 tokens in and 26 out on average
# Where throughput decides, where both count, where a steady stream does. Milliseconds.
SLOS = ("750,50", "1000,25", "1500,15")
WORKERS = (2, 3)  # a comparison needs two; three have 1p2d and 2p1d as well


def main() -> None:
    args = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through what ends the servers
    began_s = time.perf_counter()
    cores = len(os.sched_getaffinity(0))
    found: list[tuple[int, list[Duel]]] = []
    for num_workers in WORKERS:
        if num_workers > cores:
            print(f"skipped: {num_workers} workers need as many cores, here are {cores}")
            continue
        profile = read_or_measure(args.profile, args.model, num_workers)
        print(f"\n{num_workers} workers on {cores} cores\n{tables.HEAD}", flush=True)
        found.append((num_workers, [compared(profile, slo, num_workers, args) for slo in args.slo]))
    if not found:
        reason = f"two workers need two cores, here are {cores}"
        emit({"bench": "goodput", "skipped": reason})
        return
    report(found, args, time.perf_counter() - began_s)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", help="default: the demo model")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="measured before")
    parser.add_argument("--slo", nargs="+", type=slo_of, default=[slo_of(one) for one in SLOS])
    parser.add_argument("--divisor", type=float, default=DIVISOR, help="of the lengths of chat")
    parser.add_argument("--out", type=Path, default=RESULTS / "goodput.json", metavar="FILE")
    parser.add_argument("--figure", type=Path, default=RESULTS / "goodput.svg", metavar="FILE")
    return parser.parse_args()


def slo_of(text: str) -> Slo:
    """From "500,50": TTFT and TPOT in milliseconds."""
    ttft_ms, tpot_ms = map(float, text.split(","))
    return Slo(ttft_ms / 1e3, tpot_ms / 1e3)


def read_or_measure(path: Path | None, model: str | None, num_workers: int) -> Profile:
    """The file's, or what `nodeserve profile` measures now."""
    if path is not None:
        return profile_store.read(path)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "profile.json"
        command = [sys.executable, "-m", "nodeserve", "profile", *([model] if model else [])]
        command += ["--device", "cpu", "--workers", str(num_workers), "--output", str(output)]
        subprocess.run(command, check=True)
        return profile_store.read(output)


def compared(profile: Profile, slo: Slo, num_workers: int, args: argparse.Namespace) -> Duel:
    """Plan, then run the layouts in turn until enough is known of both."""
    duel = plan_duel(profile, Source("chat", divisor=args.divisor), slo, num_workers)
    print(f"{duel.title}: {duel.verdict.reason}", flush=True)
    turn = 0
    while waiting := [arm for arm in duel.arms if arm.bracket.next_rate() is not None]:
        # Forth and back, so that a machine that slows down slows both.
        for arm in waiting if turn % 2 == 0 else waiting[::-1]:
            source = Source("chat", divisor=args.divisor, seed=len(arm.bracket.runs))
            live.run(duel, arm, source, args.model)
            print(f"    {tables.run_words(arm)}", file=sys.stderr, flush=True)
        turn += 1
    print("\n".join(tables.lines(duel)), flush=True)
    return duel


def report(found: list[tuple[int, list[Duel]]], args: argparse.Namespace, wall_s: float) -> None:
    """The verdicts, the figure, the last line."""
    duels = [duel for _, group in found for duel in group]
    verdicts = tables.aims(duels)
    print("", *(f"{'met' if met else 'MISSED':7} {text}" for text, met in verdicts), sep="\n")
    values = {
        "bench": "goodput",
        "workload": f"chat, lengths divided by {args.divisor:g}",
        "workers": [
            {"workers": number, "slos": [tables.values(duel) for duel in group]}
            for number, group in found
        ],
        "aims": [{"aim": text, "met": met} for text, met in verdicts],
        "wall_s": round(wall_s, 1),
    }
    args.figure.write_text(tables.picture(duels))
    save(args.out, values)
    emit(values)


if __name__ == "__main__":
    main()
