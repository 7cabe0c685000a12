"""Options, files and errors of the command line, without a server."""

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from nodeserve import gpus as gpus_module
from nodeserve.cli import launch, main
from nodeserve.cli.launch import event_writer, open_log
from nodeserve.cli.progress import BarPainter, StartReport
from nodeserve.cli.settings import (
    ENGINE_HELP,
    ENGINE_OPTIONS,
    SAMPLING_HELP,
    parse_bytes,
    read_toml,
    to_arguments,
)
from nodeserve.config import EngineConfig
from nodeserve.coordinator import server as server_module
from nodeserve.errors import ConfigError, ModelError
from nodeserve.gpus import Gpu, Gpus
from nodeserve.types import SAMPLING_FIELDS, StartEvent

Start = Callable[..., EngineConfig]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


class FakeServe:
    """Stands where the server is: keeps the settings, ends at once."""

    def __init__(self) -> None:
        self.config: EngineConfig | None = None
        self.result: int | Exception = 0
        self.events: list[StartEvent] = []

    def __call__(
        self, config: EngineConfig, on_event: Callable[[StartEvent], None], gpus: Gpus
    ) -> int:
        self.config, self.gpus = config, gpus
        for event in self.events:
            on_event(event)
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> FakeServe:
    fake = FakeServe()
    monkeypatch.setattr(server_module, "serve", fake)
    monkeypatch.setattr(launch, "beside", lambda config: contextlib.nullcontext([]))
    monkeypatch.setattr(launch, "set_up", lambda *_: None)
    monkeypatch.setenv("NODESERVE_SOCKET", "/srv/ns.sock")
    return fake


# ---- options


def test_every_setting_is_an_option() -> None:
    assert set(ENGINE_HELP) == {field.name for field in fields(EngineConfig)}
    assert set(SAMPLING_HELP) == SAMPLING_FIELDS - {
        *("constraint", "logit_bias", "logprobs", "stop_token_ids")
    }


def test_without_options_the_defaults_stand(serve: FakeServe) -> None:
    assert run("start").exit_code == 0
    assert serve.config == EngineConfig(socket="/srv/ns.sock")


def test_options_become_settings(serve: FakeServe) -> None:
    options = "--layout 2p2d --kv-memory 512MiB --max-num-seqs 8 --dtype float32 --socket /a.sock"
    assert run("start", "some/model", *options.split()).exit_code == 0
    assert serve.config == EngineConfig(
        model="some/model",
        layout="2p2d",
        kv_memory=512 << 20,
        max_num_seqs=8,
        dtype="float32",
        socket="/a.sock",
    )


def test_the_model_may_be_an_option_but_not_another_one(serve: FakeServe) -> None:
    assert run("start", "--model", "a").exit_code == 0
    assert serve.config is not None and serve.config.model == "a"
    assert run("start", "a", "--model", "a").exit_code == 0
    wrong = run("start", "a", "--model", "b")
    assert wrong.exit_code == 2
    assert "MODEL and --model name different models" in wrong.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["start", "--no-such-option"],
        ["start", "--block-size", "x"],
        ["start", "--kv-memory", "many"],
        ["start", "--config", "/nowhere.toml"],
        ["start", "a", "b"],
        ["complete"],
        ["no-such-command"],
    ],
)
def test_wrong_usage_is_code_2(serve: FakeServe, arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2
    assert serve.config is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4096", 4096),
        ("512MiB", 512 << 20),
        ("512 mib", 512 << 20),
        ("2GB", 2 * 10**9),
        ("2G", 2 * 10**9),
        ("1.5KiB", 1536),
        ("7B", 7),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1XB", "1 2", "1e9", "512MiBs"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="512MiB"):
        parse_bytes(text)


def test_settings_survive_being_written_as_a_command_line(serve: FakeServe) -> None:
    of_kind: dict[type, Any] = {int: 48, float: 0.5, bool: True, str: "-x y"}
    values = {option.name: of_kind[option.kind] for option in ENGINE_OPTIONS}
    config = EngineConfig(**{**values, "socket": "/a b.sock"})
    assert run("start", *to_arguments(config)).exit_code == 0
    assert serve.config == config


def test_a_zero_is_written_out_and_not_taken_for_unset(serve: FakeServe) -> None:
    config = EngineConfig(socket="/s", window_k=0.0, max_num_seqs=0, kv_memory=0, seed=0)
    assert run("start", *to_arguments(config)).exit_code == 0
    assert serve.config == config


# ---- the file


def write(folder: Path, text: str) -> Path:
    path = folder / "settings.toml"
    path.write_text(text)
    return path


def test_a_file_gives_settings_and_the_command_line_wins(serve: FakeServe, tmp_path: Path) -> None:
    path = write(tmp_path, 'model = "m"\nlayout = "8m"\nkv-memory = "2GB"\nblock-size = 32\n')
    assert run("start", "--config", str(path), "--layout", "1p1d").exit_code == 0
    assert serve.config == EngineConfig(
        model="m", layout="1p1d", kv_memory=2 * 10**9, block_size=32, socket="/srv/ns.sock"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "layuot = '1p1d'",
            "unknown key 'layuot'; known keys: admission, allow-users, api-key-file, attention",
        ),
        ("block_size = 16", "unknown key 'block_size'"),
        ("block-size = '16'", "block-size must be a whole number, got '16'"),
        ("block-size = true", "block-size must be a whole number"),
        ("layout = 8", "layout must be a string, got 8"),
        ("kv-memory = 'much'", "cannot read 'much' as a size"),
        ("kv-memory = 1.5", "kv-memory must be a whole number"),
        ("= 5", "cannot read"),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_name(
    serve: FakeServe, tmp_path: Path, text: str, words: str
) -> None:
    result = run("start", "--config", str(write(tmp_path, text)))
    assert result.exit_code == 1
    assert words in result.stderr
    assert serve.config is None


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="x.toml"):
        read_toml(tmp_path / "x.toml")


# ---- how it ends


@pytest.mark.parametrize("code", [0, 1])
def test_the_exit_code_is_the_servers(serve: FakeServe, code: int) -> None:
    serve.result = code
    assert run("start").exit_code == code


def test_a_typed_error_is_one_line(serve: FakeServe) -> None:
    serve.result = ModelError("no model at x: give one")
    result = run("start", "x")
    assert result.exit_code == 1
    assert result.stderr == "Error: no model at x: give one\n"


def test_a_bug_keeps_its_traceback(serve: FakeServe) -> None:
    serve.result = ZeroDivisionError()
    assert isinstance(run("start").exception, ZeroDivisionError)


def test_a_socket_path_that_is_too_long_is_refused(serve: FakeServe) -> None:
    result = run("start", "--socket", "/" + "x" * 200)
    assert result.exit_code == 1
    assert "at most 107" in result.stderr


@pytest.mark.parametrize(
    "arguments", [["complete", "x"], ["chat"], ["status"], ["stop"], ["status", "--json"]]
)
def test_without_a_server_every_command_says_so(tmp_path: Path, arguments: list[str]) -> None:
    result = run(*arguments, "--socket", str(tmp_path / "none"))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "no server on" in result.stderr and "nodeserve start" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_version_and_help() -> None:
    assert run("version").output.startswith("nodeserve 0.")
    assert run("-h").exit_code == 0


# ---- progress

EVENTS = [
    StartEvent("model", None, 0, 1, "path"),
    StartEvent("model", None, 1, 1, "Name"),
    StartEvent("note", None, 0, 0, "3 workers share 2 cores"),
    StartEvent("workers", None, 0, 2),
    StartEvent("loading", 0, 1, 2, "weights"),
    StartEvent("loading", 1, 2, 2, "weights"),
    StartEvent("loading", 0, 2, 2, "weights"),
    StartEvent("pages", None, 1, 1),
    StartEvent("ready", None, 1, 1, "/srv/ns.sock"),
]
LINES = [
    "looking for path",
    "model Name",
    "note: 3 workers share 2 cores",
    "starting 2 workers",
    "worker 1: weights done",
    "worker 0: weights done",
    "workers are loaded and see each other's pages",
    "ready: /srv/ns.sock",
]


def test_a_start_is_told_in_lines_with_seconds(serve: FakeServe) -> None:
    serve.events = EVENTS
    lines = run("start").stderr.splitlines()
    assert len(lines) == len(LINES)
    for line, words in zip(lines, LINES, strict=True):
        assert line.endswith(words)
    assert lines[0].startswith("[") and lines[0].index(" s] ") < 12


def test_bars_take_every_event() -> None:
    """A bar without its first phase broke the whole start on a terminal."""
    with StartReport(BarPainter()) as report:
        for event in EVENTS * 2:
            report.on_event(event)


def test_events_travel_through_a_pipe_until_ready(serve: FakeServe) -> None:
    serve.events = EVENTS
    ours, theirs = os.pipe()
    result = run("start", f"--events-fd={theirs}")
    assert (result.exit_code, result.stderr) == (0, "")
    with os.fdopen(ours) as lines:
        assert [StartEvent(**json.loads(line)) for line in lines] == EVENTS


def test_a_watcher_that_is_gone_stops_nobody(serve: FakeServe) -> None:
    serve.events = EVENTS
    ours, theirs = os.pipe()
    os.close(ours)
    assert run("start", f"--events-fd={theirs}").exit_code == 0


def test_a_second_start_keeps_the_log_of_the_first(tmp_path: Path) -> None:
    """A refused `start --detach` emptied the log of the server that runs."""
    path = tmp_path / "node.log"
    for words in (b"first\n", b"second\n"):
        with open_log(path) as log:
            os.write(log, words)
    assert path.read_bytes() == b"first\nsecond\n"


def test_hidden_gpus_stay_hidden(serve: FakeServe, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Gpus(tuple(Gpu(i, "H200", 1 << 37, 1 << 37) for i in range(2)))
    monkeypatch.setattr(gpus_module, "find_gpus", lambda: found)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert run("start").exit_code == 0
    assert [gpu.index for gpu in serve.gpus.found] == [1]


def test_events_after_the_start_go_nowhere() -> None:
    """A worker that was started again told of its loading on a descriptor that was closed at
    "ready": that ended the node, or wrote into the stream of a client that had its number."""
    reading, writing = os.pipe()
    tell = event_writer(writing)
    tell(StartEvent("loading", 0, 1, 2, "weights"))
    tell(StartEvent("ready", None, 1, 1, "socket"))
    with os.fdopen(reading) as lines:
        assert [json.loads(line)["phase"] for line in lines] == ["loading", "ready"]
    other_reading, other_writing = os.pipe()
    try:
        assert writing in (other_reading, other_writing), "the number is given again"
        tell(StartEvent("loading", 0, 1, 2, "weights"))
        os.set_blocking(other_reading, False)
        with pytest.raises(BlockingIOError):
            os.read(other_reading, 1)
    finally:
        os.close(other_reading)
        os.close(other_writing)
