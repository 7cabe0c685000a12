"""The command that `nodeserve plan` prints starts, as it is printed, what was planned."""

import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nodeserve import Client, profile_store
from nodeserve.policy.cost import StepCost
from nodeserve.policy.profiles import PROFILES
from tests.e2e.conftest import served
from tests.patience import PATIENCE_S

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
