"""Profiles in files: written, found by name, refused when they are broken."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nodeserve import profile_store
from nodeserve.errors import ConfigError
from nodeserve.layout import Shape
from nodeserve.policy.cost import StepCost
from nodeserve.policy.profile import Family
from nodeserve.policy.profiles import PROFILES

MINE = replace(
    PROFILES["llama-3.1-8b-h100"],
    name="mine",
    cost=replace(
        PROFILES["llama-3.1-8b-h100"].cost,
        large=StepCost(0.1, 0.2, 0.3, 0.4, 0.5, 0.6),
        large_seqs=9,
        floor=StepCost(0.6, 0.5, 0.4, 0.3, 0.2, 0.1),
    ),
)


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NODESERVE_PROFILES", str(tmp_path / "store"))
    return tmp_path / "store"


def test_what_was_written_is_found_by_its_name(store: Path) -> None:
    assert profile_store.stored_names() == []
    path = profile_store.write(MINE, {"threads": 2})
    assert path == store / "mine.json"
    assert profile_store.profile_or_family("mine") == MINE
    assert profile_store.shaped_profile(str(path), Shape()) == MINE
    assert profile_store.measured("mine") == {"threads": 2}
    assert profile_store.stored_names() == ["mine"]
    assert [one.name for one in store.iterdir()] == ["mine.json"]


def test_a_path_may_be_given(tmp_path: Path) -> None:
    path = profile_store.write(MINE, {}, tmp_path / "elsewhere.json")
    assert profile_store.shaped_profile(str(path), Shape()) == MINE
    assert profile_store.stored_names() == []


def test_the_folder_follows_the_environment() -> None:
    assert profile_store.folder({"NODESERVE_PROFILES": "/a"}) == Path("/a")
    assert profile_store.folder({"XDG_CONFIG_HOME": "/b"}) == Path("/b/nodeserve/profiles")
    assert profile_store.folder({}) == Path("~/.config/nodeserve/profiles").expanduser()


def test_names_that_come_with_the_package_are_first() -> None:
    assert profile_store.shaped_profile("moe-ep8", Shape()) is PROFILES["moe-ep8"]
    assert profile_store.shaped_profile("opt-13b-a100", Shape()) is PROFILES["opt-13b-a100"]
    assert isinstance(profile_store.profile_or_family("opt-13b-a100"), Family)
    assert profile_store.measured("moe-ep8") == {}
    with pytest.raises(ConfigError, match=r"no tp1\.pp1: use one of"):
        profile_store.shaped_profile("opt-66b-a100", Shape())
    with pytest.raises(ConfigError, match="comes with nodeserve"):
        profile_store.write(replace(MINE, name="moe-ep8"), {})


def test_an_unknown_name_is_answered_with_those_there_are() -> None:
    profile_store.write(MINE, {})
    with pytest.raises(ConfigError, match=r"no profile 'other': use one of moe-ep8, .*mine"):
        profile_store.shaped_profile("other", Shape())


@pytest.mark.parametrize("name", ["", "../x", "A", "a b", "x.json", "-a", "a" * 101])
def test_names_are_plain(name: str) -> None:
    with pytest.raises(ConfigError, match="profile name"):
        profile_store.check_name(name)


def test_names_are_made_from_models_and_devices() -> None:
    name = profile_store.name_for("meta/Llama-3.1 8B", "NVIDIA H200")
    assert name == "meta-llama-3.1-8b-nvidia-h200"
    profile_store.check_name(name)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 99},
        {"num_kv_tokens": 0},
        {"num_kv_tokens": "many"},
        {"noise": -1},
        {"handoff_bytes_per_s": 0},
        {"cost": {}},
        {"cost": {**profile_store.to_json(MINE)["cost"], "token_s": -1.0}},
        {"cost": None},
        {"cost": {**profile_store.to_json(MINE)["cost"], "large": 3}},
        {"cost": {"x" * 100_000: 1.0}},
        {"anatomy": {"num_layers": 2}},
        {"anatomy": {**profile_store.to_json(MINE)["anatomy"], "num_kv_heads": 0}},
        {"anatomy": {**profile_store.to_json(MINE)["anatomy"], "hop_s": "none"}},
        {"anatomy": [1]},
    ],
    ids=lambda change: str(change)[:60],
)
def test_a_broken_file_is_refused(store: Path, change: dict[str, Any]) -> None:
    path = profile_store.write(MINE, {})
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigError, match=r"mine\.json") as caught:
        profile_store.shaped_profile("mine", Shape())
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 100_000])
def test_a_file_that_is_no_profile_is_refused(store: Path, text: str) -> None:
    path = profile_store.write(MINE, {})
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"mine\.json"):
        profile_store.shaped_profile("mine", Shape())
