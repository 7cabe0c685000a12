"""`nodeserve top` without a terminal: lines of text, and what keys do."""

import asyncio
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.text import Text

from nodeserve.cli import main
from nodeserve.cli.top.live import keys_of
from nodeserve.cli.top.screen import SORTS, Choice, bar_of, lines_of, plain, spark
from nodeserve.views import Frame, History
from tests.fakes.answers import answer, span, worker
from tests.fakes.server import FakeServer

FREE = [70, 60, 55, 20, 10, 2, 50, 0]


def frame_of(num_workers: int = 8, **values: Any) -> Frame:
    """A node that has trouble with its decode side, three seconds after the answer before."""
    workers = [
        worker(
            index,
            "prefill" if index < num_workers // 2 else "decode",
            running=index % 7,
            free_blocks=FREE[index % 8],
            waiting_tokens=1234 * index,
            step_ms=10.0 * (index % 3),
            tokens_per_s=12345.6,
        )
        for index in range(num_workers)
    ]
    spans = [span(10, 50, handoff_wait=31, buffer=19), span(60, 3), span(300, 9)]
    told = answer(100.0, spans, **{"layout": "4p4d", "workers": workers, **values})
    history = History()
    history.add(told)
    later = [{**one, "busy_s": 0.3 * one["index"]} for one in told["workers"]]
    return history.add({**told, "uptime_s": 103.0, "workers": later})


def texts(frame: Frame, choice: Choice | None = None) -> list[str]:
    """On the smallest terminal."""
    return [line.plain.rstrip() for line in lines_of(frame, choice or Choice(), 80, 24)]


def shown(lines: list[str]) -> list[int]:
    """Workers, in the order of their rows."""
    return [int(line.split()[0][1:]) for line in lines if line[:1] == "w" and line[1:2].isdigit()]


def test_a_node_of_eight_fits_the_smallest_terminal() -> None:
    lines = texts(frame_of())
    assert len(lines) == 24 and max(map(len, lines)) <= 80
    assert lines[0] == "m  4p4d  up 0:01:43  loop lag 7 ms" + " " * 41 + "ready"
    assert lines[1] == "decode KV full on w7: 62% of misses in 10 s"
    assert lines[4] == "attainment       50%    100%    100%  ▅"
    assert lines[11] == "misses      in 10 s: handoff wait 31, buffer 19"
    assert lines[13].split() == [
        *("id", "role", "state", "batch", "wait", "pin", "KV", "busy", "step", "ms", "tok/s"),
        "queue",
    ]
    assert lines[18] == (
        "w4  decode   ready          4    0   0  ████████▏  90%  40%    10.0  12.3k  4936"
    )
    assert shown(lines) == list(range(8))
    assert lines[23] == "q quit  p pause  s sort: id  r reverse  up/down scroll"


def test_who_follows_is_named_with_its_leader() -> None:
    lines = texts(frame_of(workers=[worker(0, "mixed"), worker(1, "mixed", rank=1, leader=0)]))
    assert lines[14].startswith("w0  mixed    ready          0    0   0  ")
    assert lines[15] == "w1  mixed    ready       computes with w0"


SIZES = list(product((0, 1, 8, 40), (1, 20, 80, 200), (1, 5, 24, 60)))


@pytest.mark.parametrize(("num_workers", "width", "height"), SIZES)
def test_every_size_gets_exactly_what_fits(num_workers: int, width: int, height: int) -> None:
    lines = lines_of(frame_of(num_workers), Choice(), width, height)
    assert len(lines) == height or height < 2
    assert max(line.cell_len for line in lines) <= width


def test_what_does_not_fit_is_counted_and_reached_by_scrolling() -> None:
    frame, choice = frame_of(40), Choice()
    lines = texts(frame, choice)
    assert shown(lines) == list(range(9)) and lines[-1].endswith("1-9 of 40")
    for _ in range(50):
        choice = choice.after("down")
    lines = texts(frame, choice)
    assert shown(lines) == list(range(31, 40)) and lines[-1].endswith("32-40 of 40")
    back = choice.within(40, 24).after("up")
    assert shown(texts(frame, back)) == list(range(30, 39)), "from where it can be seen to be"
    assert shown(texts(frame, Choice(scroll=1).after("k").after("up"))) == list(range(9))
    assert shown([line.plain for line in lines_of(frame, Choice(), 80, None)]) == list(range(40))


def test_keys_sort_by_each_column_and_back() -> None:
    frame, choice, seen = frame_of(), Choice(), []
    for _ in SORTS:
        seen.append((choice.sort, shown(texts(frame, choice))))
        choice = choice.after("s")
    assert choice == Choice()
    orders = dict(seen)
    assert orders["id"] == orders["role"][4:] + orders["role"][:4] == list(range(8))
    assert orders["batch"] == [6, 5, 4, 3, 2, 1, 0, 7]
    assert orders["KV"] == [7, 5, 4, 3, 6, 2, 1, 0]
    assert orders["busy"] == orders["queue"] == list(range(7, -1, -1))
    assert shown(texts(frame, Choice("KV").after("r"))) == orders["KV"][::-1]


def test_other_keys_change_nothing() -> None:
    assert Choice().after("x") == Choice() == Choice().after("p").after(" ")
    assert list(keys_of("sq\x1b[A\x1bOBj\x1b")) == ["s", "q", "up", "down", "j", "\x1b"]


def test_the_first_line_says_that_it_stands_still() -> None:
    assert texts(frame_of(), Choice(paused=True))[0].endswith(" paused")
    health = {"state": "not ready", "reasons": ["nobody decodes"], "loop_lag_ms": 0.0}
    lines = texts(frame_of(health=health))
    assert lines[0].endswith(" not ready") and lines[1] == "not ready: nobody decodes"
    lines = [line.plain for line in lines_of(frame_of(), Choice(), 80, 24, "no answer")]
    assert lines[1] == "no answer"


def test_stand_ins_and_lost_workers_are_marked() -> None:
    workers = [worker(0, "prefill", acting="mixed"), worker(1, "decode", state="restarting")]
    lines = [line for line in texts(frame_of(workers=workers)) if line.startswith("w")]
    assert lines[0].split()[1:3] == ["prefill+", "ready"] and "restartin" in lines[1]


def test_what_is_unknown_is_left_out() -> None:
    first = History().add(answer())
    lines = texts(first)
    assert lines[9] == "queue       0 (0 tokens)  0 parked  staggered 9 ms"
    assert lines[10] == "passes      210 ms" and lines[11] == "misses      none"
    assert lines[6].split()[:5] == ["TTFT", "p90", "ms", "-", "-"]


def test_without_utf8_the_same_is_shown_in_ascii() -> None:
    lines = lines_of(frame_of(), Choice(), 80, 24)
    before = [line.plain for line in lines]
    plain(lines)
    assert all(line.plain.isascii() for line in lines)
    assert [len(line.plain) for line in lines] == [len(line) for line in before]


@pytest.mark.parametrize(
    ("share", "bar"),
    [(0.0, "·········"), (1.0, "█████████"), (0.5, "████▌····"), (-1.0, "·" * 9), (7.0, "█" * 9)],
)
def test_bars(share: float, bar: str) -> None:
    assert bar_of(share) == bar


def test_curves_have_a_character_for_each_point() -> None:
    assert spark([0.0, 0.5, None, 1.0], 1.0) == "▁▅ █"
    assert spark([0.0, 5.0, 10.0], None) == "▁▅█" and spark([None, None], None) == "  "
    assert spark([0.0, 0.0], None) == "▁▁" and spark([], None) == ""


def test_colours_follow_the_state() -> None:
    frame = frame_of()
    lines = lines_of(frame, Choice(), 80, 24)
    assert lines[1].style == "bold yellow"
    fine = lines_of(replace(frame, spans=frame.spans[1:]), Choice(), 80, 24)
    assert fine[1].style == "bold green"
    full = next(line for line in lines if line.plain.startswith("w7"))
    assert "red" in [one.style for one in full.spans] and isinstance(full, Text)


# ---- the command, with stdout that is no terminal


async def run(server: FakeServer, *arguments: str) -> Result:
    command = ["top", "--interval", "0.1", *arguments, "--socket", str(server.path)]
    return await asyncio.to_thread(CliRunner().invoke, main, command)


@pytest.mark.parametrize("arguments", [(), ("--once",)])
async def test_a_pipe_gets_one_whole_frame(server: FakeServer, arguments: tuple[str, ...]) -> None:
    server.stats = answer(workers=[worker(number, "mixed") for number in range(30)])
    result = await run(server, *arguments)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert shown(lines) == list(range(30)) and "\x1b" not in result.stdout
    assert lines[1] == "idle" and lines[-1].startswith("w29")
    assert max(map(len, lines)) <= 100


async def test_nobody_there_is_one_line(tmp_path: Any) -> None:
    command = ["top", "--socket", str(tmp_path / "none.sock")]
    result = await asyncio.to_thread(CliRunner().invoke, main, command)
    assert result.exit_code == 1 and result.stderr.startswith("Error: ")
    assert len(result.stderr.splitlines()) == 1
