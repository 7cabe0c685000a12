"""What the sections of gpu-check conclude from what they saw, right, wrong or half-right."""

import math
import struct
from array import array
from pathlib import Path

import pytest
import torch

from bench.gpu import experts
from bench.gpu.bed import Bed, NoCeiling
from bench.gpu.drive import Room, decode_s, sequences
from bench.gpu.lines import FAIL, INFO, NOT_REACHED, PASS, Sheet
from bench.gpu.plan import SECTIONS
from bench.gpu.sections import build, continuous, graphs, ipc, kernels, sanitizer, served, tokens
from bench.gpu.sections import experts as section
from bench.gpu.sections.sanitizer import TOOLS
from bench.gpu.serving import Answer
from bench.gpu.shards import Whole, ranks_of, values
from bench.gpu.workload import Load
from nodeserve.policy.batching import Batch
from nodeserve.wire.messages import End
from nodeserve.worker.contract import Computed, Sampled


@pytest.fixture
def bed(tmp_path: Path) -> Bed:
    return Bed(Sheet(tmp_path / "sheet.jsonl", quiet=True), {"load_tokens_per_s": 900.0}, False)


# ---- compute-sanitizer


DONE = "copied 100 bytes in 3 launches"
CLEAN = {
    "memcheck": f"{DONE}\n========= ERROR SUMMARY: 0 errors",
    "racecheck": f"{DONE}\n===== RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
}


@pytest.mark.parametrize("tool", TOOLS)
def test_a_clean_run_under_the_sanitizer(tool: str) -> None:
    assert sanitizer.judged(tool, tool, 0, CLEAN[tool]).state == PASS


@pytest.mark.parametrize(
    ("tool", "code", "output"),
    [
        ("memcheck", 9, CLEAN["memcheck"]),
        ("memcheck", 0, f"{DONE}\n========= ERROR SUMMARY: 10 errors"),
        ("memcheck", 0, "========= ERROR SUMMARY: 0 errors"),  # the program did not get to its end
        ("memcheck", 0, DONE),  # nobody watched
        ("racecheck", 0, CLEAN["memcheck"]),  # another tool did
        ("racecheck", 0, f"{DONE}\n=== RACECHECK SUMMARY: 20 hazards displayed"),
        ("memcheck", 0, f"Device not supported\n{DONE}"),
    ],
)
def test_a_run_that_shows_nothing(tool: str, code: int, output: str) -> None:
    line = sanitizer.judged(tool, tool, code, output)
    assert line.state == FAIL and line.note.startswith(f"exit code {code}:")


# ---- pytest's report


REPORT = """<testsuites><testsuite>
<testcase classname="tests.gpu.test_a" name="one"/>
<testcase classname="tests.gpu.test_a" name="two"><failure message="m">t</failure></testcase>
<testcase classname="tests.gpu.test_b" name="three"><skipped message="m"/></testcase>
<testcase classname="tests.gpu.test_c" name="four"/>
<testcase classname="tests.gpu.test_c" name="five"><skipped message="m"/></testcase>
<testcase classname="tests.gpu.test_d" name="six"><error message="m">t</error></testcase>
</testsuite></testsuites>"""


def test_a_file_of_skipped_tests_is_no_pass(tmp_path: Path) -> None:
    path = tmp_path / "report.xml"
    path.write_text(REPORT)
    lines = {line.name: line for line in kernels.lines_of(kernels.read(path))}
    states = {name: line.state for name, line in lines.items()}
    assert states == {"test_a": FAIL, "test_b": FAIL, "test_c": PASS, "test_d": FAIL}
    assert lines["test_a"].note == "1 passed, 1 failed, 0 skipped: two"


# ---- graphs


def row(chosen: float, top: dict[int, float]) -> list[object]:
    ids, logprobs = list(top), list(top.values())
    return [chosen, array("i", ids).tobytes(), array("f", logprobs).tobytes()]


def test_the_gap_between_two_tokens_of_a_step() -> None:
    found = row(-0.5, {7: -0.5, 3: -0.75})
    assert graphs.gap_of(found, 3) == 0.25
    assert graphs.gap_of(found, 9) == float("inf")
    assert struct.calcsize("<2i") == len(found[1])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tokens", "chosen", "problem"),
    [
        ([7, 7], -0.5, ""),
        ([7, 7], -0.6, ""),
        ([7, 7], -0.9, "log probabilities differ by 0.4"),
        ([3, 1], -0.5, ""),  # parted at a near tie: what follows cannot be compared
        ([9, 7], -0.5, "token 0 is 9 and 7, inf apart"),
        ([7, 7], float("nan"), "log probabilities differ by"),
    ],
)
def test_answers_part_at_near_ties_only(tokens: list[int], chosen: float, problem: str) -> None:
    top = {7: -0.5, 3: -0.625}
    eager = ([7, 7], [row(-0.5, top), row(-0.5, top)])
    replayed = (tokens, [row(chosen, top), row(chosen, top)])
    assert graphs.parted([replayed], [eager], 0.2)[1].startswith(problem)
    assert bool(graphs.parted([replayed], [eager], 0.2)[1]) == bool(problem)


def test_every_captured_size_is_tried_full_and_padded() -> None:
    assert graphs.sizes_to_try((1, 2, 4, 8), 8) == [1, 2, 3, 4, 7, 8]


# ---- tokens


def logits(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows)


@pytest.mark.parametrize(
    ("second", "state"), [([0.0, 2.0], PASS), ([2.05, 2.0], PASS), ([2.5, 2.0], FAIL)]
)
def test_an_answer_against_the_reference(second: list[float], state: str) -> None:
    found = logits([1.0, 0.0], second)
    line = tokens.compared("name", [[5]], [[0, 1]], lambda prompt, answer: (found, 0.1))
    assert line.state == state


# ---- the wait for the second token


def answer(times_s: list[float], code: str | None = None) -> Answer:
    end = End(0, "length", code, "", {}, {"handoff_s": 0.001}, None)
    return Answer([1] * len(times_s), times_s, end)


def test_the_wait_is_what_the_second_token_took_longer() -> None:
    times = [1.0, 1.035, 1.045, 1.055, 1.065]
    assert served.usual_gap_s(times) == pytest.approx(0.010)
    assert served.extra_wait_s(times) == pytest.approx(0.025)
    assert served.wait_line("w", [answer(times)], 26.0).state == PASS
    assert served.wait_line("w", [answer(times)], 24.0).state == FAIL


@pytest.mark.parametrize(
    "found",
    [
        [],
        [answer([1.0, 1.1, 1.2])],  # too short to say what is usual
        [answer([1.0, 1.1, 1.2, 1.3], code="worker_lost")],
        [answer([1.0, 1.1, 1.2, 1.3]), Answer([1], [1.0], None)],
    ],
)
def test_failed_answers_are_no_measurement(found: list[Answer]) -> None:
    assert served.wait_line("w", found, 1e9).state == FAIL


# ---- beside transformers


@pytest.mark.parametrize(
    ("lengths", "seconds", "states"),
    [
        ([8, 8], 0.04, [INFO, PASS]),  # 400 tokens/s, ours 900
        ([8, 8], 0.03, [INFO, FAIL]),
        ([8, 7], 0.04, [FAIL]),
        ([8], 0.04, [FAIL]),
    ],
)
def test_twice_the_tokens(bed: Bed, lengths: list[int], seconds: float, states: list[str]) -> None:
    found = continuous.judged(bed, Load(2, 4, 8), lengths, seconds)
    assert [line.state for line in found] == states


def test_nothing_is_divided_by_a_ceiling_that_nobody_measured(bed: Bed) -> None:
    assert bed.ceiling("load_tokens_per_s") == 900.0
    with pytest.raises(NoCeiling, match="left no copy_gb_s"):
        bed.ceiling("copy_gb_s")


def test_prompts_are_the_same_for_both_and_share_no_beginning() -> None:
    load = Load(16, 32, 4)
    prompts = load.prompts(1000)
    assert prompts == load.prompts(1000)
    assert len({tuple(prompt[:3]) for prompt in prompts}) == 16
    assert all(0 < token < 1000 for prompt in prompts for token in prompt)


# ---- pages


WHOLE = Whole(num_layers=3, num_heads=8, block_size=16, head_dim=8)


def test_every_place_and_generation_has_its_own_value() -> None:
    [rank] = ranks_of(WHOLE, 1)
    blocks, device = torch.arange(6), torch.device("cpu")
    first, second = (values(WHOLE, rank, blocks, g, device) for g in (1, 2))
    assert first.shape == (6, 3, 2, 8, 16, 8)
    assert float((first == second).float().mean()) < 1e-3
    for dim in range(first.dim()):
        assert float((first == first.roll(1, dim)).float().mean()) < 1e-3


@pytest.mark.parametrize("degree", [1, 2, 4, 8, 16])
def test_a_rank_is_a_slice_of_the_whole(degree: int) -> None:
    blocks, device = torch.tensor([5, 2]), torch.device("cpu")
    everything = values(WHOLE, ranks_of(WHOLE, 1)[0], blocks, 1, device)
    ranks, shards = ranks_of(WHOLE, degree), ipc.page_shards(WHOLE, degree)
    assert {head for r in ranks for head in range(r.first_head, r.first_head + r.num_heads)} == set(
        range(8)
    )
    for rank, shard in zip(ranks, shards, strict=True):
        heads = slice(rank.first_head, rank.first_head + rank.num_heads)
        assert torch.equal(values(WHOLE, rank, blocks, 1, device), everything[:, :, :, heads])
        assert rank.block_bytes(WHOLE) == shard.block_bytes
        assert range(heads.start, heads.stop) == shard.kv_heads


def test_a_wrong_block_is_counted() -> None:
    wanted = torch.zeros(4, 3, dtype=torch.int16)
    held = wanted.clone()
    assert ipc.difference(held, wanted) == ""
    held[2, 1] = 1
    assert ipc.difference(held, wanted) == "1 of 4 blocks are wrong, first [2]"


# ---- steps straight into an executor


class Steps:
    """An executor that notes what it is given."""

    def __init__(self, overlaps: bool) -> None:
        self.overlaps = overlaps
        self.batches: list[list[tuple[int, int, int | None]]] = []

    def opens_s(self) -> float:
        return -math.inf

    def called(self, departure: int) -> bool:
        return False

    def leave(self) -> bool:
        return False

    def launch(self, batch: Batch) -> Computed:
        work = [(one.sequence.request_id, one.start, one.feed) for one in batch.work]
        self.batches.append(work)
        return Computed(Sampled([5] * len(work), None))

    def on_done(self, wake: object) -> None:
        pass


@pytest.mark.parametrize("overlaps", [False, True])
def test_decode_steps_go_on_where_the_last_one_ended(overlaps: bool) -> None:
    executor = Steps(overlaps)
    decode_s(executor, Room(20, 16), count=2, context=30, num_steps=3, warm=2)
    starts = [[start for _, start, _ in batch] for batch in executor.batches]
    assert starts == [[29 + step] * 2 for step in range(5)]
    feeds = [[feed for _, _, feed in batch] for batch in executor.batches]
    assert feeds == [[None, None]] + [[0, 1] if overlaps else [None, None]] * 4


def test_sequences_share_no_block_and_fit() -> None:
    made = sequences(Room(12, 16), 3, 50, 60)
    blocks = [block for one in made for block in one.block_ids]
    assert sorted(blocks) == list(range(12))
    assert [len(one.token_ids) for one in made] == [50] * 3
    assert Room(12, 16).holds(3, 64) and not Room(12, 16).holds(3, 65)


# ---- what is installed


def test_unmet_requirements_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "gguf":
            raise importlib.metadata.PackageNotFoundError(name)
        return "13.9" if name == "rich" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert build.unmet() == (["gguf"], ["rich>=14, here 13.9"])


# ---- sheets


def test_what_makes_no_sense_without_a_gpu_is_not_passed(bed: Bed, tmp_path: Path) -> None:
    rehearsal = Bed(bed.sheet, {}, True)
    line = tokens.demo(rehearsal, tmp_path)
    assert (line.state, line.note) == (NOT_REACHED, "only on a GPU")
    assert rehearsal.aim(0.8) is None and bed.aim(0.8) == 0.8
    assert len(SECTIONS) == 15


# ---- experts alone


@pytest.mark.parametrize(
    ("num_tokens", "reading", "us", "state"),
    [
        (8, True, 150.0, PASS),
        (8, True, 250.0, FAIL),
        (2048, False, 1000.0, INFO),
        (8192, False, 240.0, PASS),
        (8192, False, 260.0, FAIL),
        (8, True, 50.0, FAIL),  # faster than its floor: the clock or the ceiling is wrong
    ],
)
def test_experts_against_what_bounds_them(
    bed: Bed, num_tokens: int, reading: bool, us: float, state: str
) -> None:
    row = experts.Row(experts.MODELS[0], num_tokens, 6 * num_tokens, us, 100.0, reading)
    assert section.line_of(row, bed).state == state
