"""What was planned starts: by the command that `nodeserve plan` prints, and at once."""

import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nodeserve import Client, profile_store
from nodeserve.layout import parse_layout
from nodeserve.policy.cost import StepCost
from nodeserve.policy.profiles import PROFILES
from nodeserve.policy.sizes import anatomy_of
from tests.e2e.conftest import served
from tests.patience import PATIENCE_S
from tests.reference import hub, odd_model

CONTEXT = 2000  # shorter than the default model's
MINE = replace(
    PROFILES["llama-3.1-8b-h100"],
    name="mine",
    cost=StepCost(0.010, 0.010, 1e-4, 0.0, 1e-5, 0.0),
    max_model_len=CONTEXT,
    max_num_batched_tokens=256,
    max_num_seqs=16,
)


def test_the_command_starts_as_it_is_printed(
    node_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NODESERVE_PROFILES", str(node_folder))
    profile_store.write(MINE, {"threads": 1})
    words = ["plan", "--profile", "mine", "--gpus", "2", "--slo", "ttft=1s,tpot=1s"]
    words += ["--workload", "synthetic(200,4)", "--effort", "quick", "--startable"]
    done = subprocess.run(
        [sys.executable, "-m", "nodeserve", *words],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    name, start, *options = shlex.split(done.stdout.splitlines()[-1])
    assert (name, start) == ("nodeserve", "start")
    settings = dict(zip(options[::2], options[1::2], strict=True))
    wanted = {name.removeprefix("--"): value for name, value in settings.items()}
    with served(node_folder, **wanted) as socket, Client(socket) as client:
        about, workers = client.server(), client.stats()["workers"]
        assert client.generate("One two", max_tokens=4).usage.completion_tokens == 4
    assert about["max_model_len"] == CONTEXT == int(wanted["max-model-len"])
    assert len(workers) == 2


def test_a_model_too_large_for_one_worker_starts_as_a_team(
    node_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker's pages hold two thirds of a context: what each of two tensor ranks, or of two
    stages, has of it with three heads and three layers."""
    monkeypatch.setenv("NODESERVE_PROFILES", str(node_folder))
    model = odd_model.write(node_folder / "model")
    config = hub.checkpoint_in(model).config
    anatomy = replace(anatomy_of(config, 2, 4, 1e-6, fixed_pool=True), sum_bytes_per_s=1e9)
    token_bytes = config.kv_bytes_per_token(2)
    mine = replace(MINE, anatomy=anatomy, kv_bytes_per_token=token_bytes, max_model_len=512)
    profile_store.write(mine, {"threads": 1})
    wanted = {
        **{"model": str(model), "device": "cpu", "layout": "auto"},
        **{"profile": "mine", "workload": "synthetic(40,8)", "slo": "ttft=1s,tpot=1s"},
        **{"max_model_len": 256, "kv_memory": 12 * odd_model.BLOCK_SIZE * token_bytes},
    }
    with served(node_folder, **wanted) as socket, Client(socket) as client:
        layout = parse_layout(client.server()["layout"])
        assert client.generate([1, 2, 3], max_tokens=4).usage.completion_tokens == 4
    assert all(group.shape.team_size > 1 for group in layout.groups)
