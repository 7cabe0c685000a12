"""Counts of experts from a node to a file, from there to places, and every file that is refused."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nodeserve.checkpoint import Checkpoint
from nodeserve.config import EngineConfig, ModelConfig, MoeConfig
from nodeserve.coordinator.placement import Plan, resolve
from nodeserve.coordinator.places import parts_of
from nodeserve.coordinator.supervisor import make_experts_fd
from nodeserve.errors import ConfigError
from nodeserve.expert_counts import MAX_BYTES, facts_of, read_counts, write_counts
from nodeserve.gpus import Gpus
from nodeserve.layout import Shape

MOE = MoeConfig(num_experts=6, num_active=2, intermediate_size=1 << 12, dense_layers=(0,))
MODEL = ModelConfig("mixtral", 100, 64, 128, 3, 4, 2, 16, 1024, 1e-5, 1e4, moe=MOE)
CHECKPOINT = Checkpoint(Path("x"), "gguf", MODEL, "tiny")
COUNTS: list[list[float]] = [[0] * 6, [90, 5, 5, 0, 7, 3], [1, 2, 3, 4, 5, 6.5]]
NONE = Gpus(obstacle="no NVIDIA driver answers")


def written(path: Path) -> Path:
    write_counts(path, facts_of(MODEL), COUNTS)
    return path


def started(path: Path | None, **settings: Any) -> Plan:
    """The plan of a node with these settings, that is never started."""
    counts = {} if path is None else {"expert_counts": str(path)}
    return resolve(EngineConfig(**{"layout": "1m:ep2", **counts, **settings}), CHECKPOINT, NONE)


def test_a_file_gives_the_counts_that_were_written(tmp_path: Path) -> None:
    assert read_counts(written(tmp_path / "counts.json"), MODEL) == tuple(map(tuple, COUNTS))
    with pytest.raises(ConfigError, match="cannot write .*: No such file"):
        written(tmp_path / "no" / "counts.json")


def changed(**changes: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text(json.dumps({"model": facts_of(MODEL), "counts": COUNTS, **changes}))

    return write


def one_count(text: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text(written(path).read_text().replace("90", text))

    return write


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "no file": (lambda path: None, "cannot read .*: .*No such file"),
    "a folder": (Path.mkdir, "cannot read .*"),
    "no JSON": (lambda path: path.write_text("{"), "Expecting property name"),
    "no text": (lambda path: path.write_bytes(b"\xff\xfe\xff"), "codec can't decode"),
    "a list": (lambda path: path.write_text("[1]"), "does not hold a JSON object"),
    "deep": (lambda path: path.write_text("[" * 200_000), "nested too deeply"),
    "large": (lambda path: path.write_bytes(b" " * (MAX_BYTES + 1)), "has more than .* bytes"),
    "nameless": (changed(model=None), "does not say which `model`"),
    "other model": (
        changed(model={**facts_of(MODEL), "num_experts": 8}),
        "about another model: num_experts is 8 there and 6 here",
    ),
    "no counts": (changed(counts=None), "not a list of 3 layers"),
    "layers": (changed(counts=COUNTS[:2]), "not a list of 3 layers"),
    "experts": (changed(counts=[*COUNTS[:2], [1] * 7]), "layer 2 .* not a list of 6 numbers"),
    "negative": (one_count("-1"), "layer 1, expert 0: -1 is no number of rows"),
    "not a number": (one_count("NaN"), "expert 0: nan is no number of rows"),
    "endless": (one_count("1e999"), "expert 0: inf is no number of rows"),
    "huge": (one_count("1" + "0" * 400), "expert 0: 10+.* is no number of rows"),
    "true": (one_count("true"), "expert 0: True is no number of rows"),
    "text": (one_count('"90"'), "expert 0: '90' is no number of rows"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_does_not_fit_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    spoil, words = WRONG[name]
    path = tmp_path / "counts.json"
    spoil(path)
    with pytest.raises(ConfigError, match=f"--expert-counts .*{words}.*nodeserve experts --out"):
        started(path)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "copies of anything": (
        {"redundant_experts": 2, "expert_counts": None},
        "--redundant-experts 2: give --expert-counts too",
    ),
    "negative": ({"redundant_experts": -1}, "--redundant-experts -1: use 0 or more"),
    "too many": (
        {"redundant_experts": 7},
        "--redundant-experts 7: .* ep2 with 6 experts has room for 6 copies",
    ),
    "too many for one": ({"redundant_experts": 7, "layout": "1m:ep3,1m:ep2"}, "so ep2 with 6"),
    "nobody shares": ({"layout": "1m"}, "--expert-counts: no ranks share experts in layout 1m"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_placed_is_refused_by_name(name: str, tmp_path: Path) -> None:
    settings, words = REFUSED[name]
    with pytest.raises(ConfigError, match=words):
        started(written(tmp_path / "counts.json"), **settings)


def test_a_plan_carries_the_counts_and_makes_room_for_the_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "counts.json")
    assert started(None).expert_counts is None
    assert started(path, redundant_experts=6).expert_counts == tuple(map(tuple, COUNTS))
    shape = Shape(ep=4)
    sizes = [parts_of(MODEL, shape, copies)[0].num_routed_weights for copies in (0, 2, 3, 18)]
    assert [size // (2 * 3 * 64 * (1 << 12)) for size in sizes] == [2, 2, 3, 6]
    assert parts_of(MODEL, Shape(), 3) == (MODEL,)
    small = {"max_model_len": 64, "kv_memory": 1 << 20}
    # Room for the weights of two ranks in bfloat16, each of which has three of six experts.
    room = 2 * 2 * parts_of(MODEL, Shape(ep=2))[0].num_weights + (4 << 20)
    monkeypatch.setattr("nodeserve.coordinator.room._available_bytes", lambda: room)
    started(path, **small)
    with pytest.raises(ConfigError, match="the weights take"):
        started(path, redundant_experts=6, **small)


def test_simulated_workers_hold_no_experts(tmp_path: Path) -> None:
    plan = started(tmp_path / "none", device="sim", profile="moe-ep8", layout="1m:ep8")
    assert plan.expert_counts is None and "no effect on simulated workers" in plan.notes[0]


def test_nobody_changes_what_ranks_place_by(tmp_path: Path) -> None:
    fd = make_experts_fd(((1.0, 2.0),))
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"[[2", 0)
    assert os.pread(fd, 100, 0) == b"[[1.0, 2.0]]"
    os.close(fd)
