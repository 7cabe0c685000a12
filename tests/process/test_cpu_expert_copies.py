"""Experts counted by a node, and copies of the hot ones in the next: real processes, real model."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nodeserve.expert_counts import read_counts
from tests.process.conftest import Connect, Nodes, RunningNode
from tests.process.test_cpu_ranks import NUM_TOKENS, PROMPTS, SETTINGS
from tests.reference import hub

pytestmark = pytest.mark.slow

SPARSE = (0, 2)  # layers; of the last one only rows whose logits are wanted are computed


async def tokens_of(connect: Connect, node: RunningNode) -> list[list[int]]:
    client = await connect(node)
    for number, prompt in enumerate(PROMPTS):
        client.submit(number, prompt, max_tokens=NUM_TOKENS)
    await client.finish(*range(len(PROMPTS)))
    return [client.tokens[number] for number in range(len(PROMPTS))]


def counted(node: RunningNode, out: Path) -> float:
    """Write what this node counted; how busy its busiest rank was."""
    command = [sys.executable, "-m", "nodeserve", "experts", "--socket", str(node.socket)]
    result = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    was = re.search(r"instance 0 .* was ([0-9.]+),", result.stdout)
    assert was is not None, result.stdout
    return float(was[1])


def chosen(model: torch.nn.Module, tokens: list[list[int]]) -> torch.Tensor:
    """How often transformers' router chooses each expert, [2, 8], for the rows that a node has."""
    counts = torch.zeros(2, 8, dtype=torch.int64)
    for prompt, written in zip(PROMPTS, tokens, strict=True):
        fed = torch.tensor([[*prompt, *written[:-1]]])
        with torch.no_grad():
            scores = model(fed, output_router_logits=True).router_logits
        for place, first in enumerate((0, len(prompt) - 1)):
            ids = scores[place][first:].topk(3).indices
            counts[place] += torch.bincount(ids.flatten(), minlength=8)
    return counts


async def test_a_node_counts_what_the_router_chose_and_the_next_one_places_by_it(
    nodes: Nodes, connect: Connect, tmp_path: Path
) -> None:
    """The next one also has stages: of its workers the last stage's count in the last layer."""
    folder = tmp_path / "model"
    model = hub.write_skewed("qwen3-moe", folder, PROMPTS)
    (folder / "tokenizer.json").write_text("{}")  # has to be there; nobody sends text
    settings = {"layout": "1m:ep2", "model": str(folder), **SETTINGS}
    alone = await tokens_of(connect, nodes.start(**{**settings, "layout": "1m"}))
    nodes.end()
    nodes.running.clear()

    first, out = nodes.start(**settings), tmp_path / "counts.json"
    assert await tokens_of(connect, first) == alone
    was = counted(first, out)
    config = hub.checkpoint_in(folder).config
    counts = torch.tensor(read_counts(out, config)).long()
    assert torch.equal(counts[list(SPARSE)], chosen(model, alone)) and not counts[1].any()
    nodes.end()
    nodes.running.clear()

    copies = {"expert_counts": str(out), "redundant_experts": 4}
    second = nodes.start(**{**settings, "layout": "1m:pp2.ep2"}, **copies)
    out.write_text("gone")  # all ranks go on with what was read
    assert await tokens_of(connect, second) == alone
    again = tmp_path / "again.json"
    now = counted(second, again)
    assert was > 1.15 and now < 1.0 + (was - 1.0) / 2, (was, now)
    assert torch.equal(torch.tensor(read_counts(again, config)).long(), counts)
