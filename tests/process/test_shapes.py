"""Whatever a user asks for, an instance of any shape says what one worker says."""

from pathlib import Path
from typing import Any

import pytest

from nodeserve.wire.messages import Abort
from nodeserve.wire.numbers import unpack_floats, unpack_ids
from tests.process.conftest import Connect, Nodes, audit
from tests.process.test_node import settled
from tests.reference import odd_model
from tests.reference.odd_model import EOS, MAX_LEN, settings_of

pytestmark = pytest.mark.slow

SCHEMA = '{"type":"object","properties":{"a":{"type":"integer"}},"required":["a"]}'
DRAWN = {"temperature": 1.0}
ASKED: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "seed": 1},
    {**DRAWN, "top_p": 0.8, "seed": 2},
    {**DRAWN, "top_k": 7, "min_p": 0.02, "seed": 3},
    {"repetition_penalty": 1.3},
    {**DRAWN, "presence_penalty": 0.7, "frequency_penalty": 0.4, "seed": 4},
    {"logprobs": 5},
    {**DRAWN, "logit_bias": {3: 2.0, EOS - 1: -1.0}, "logprobs": 0, "seed": 5},
    {**DRAWN, "constraint": {"regex": "[0-9]{4,9}"}, "ignore_eos": False, "seed": 6},
    {"constraint": {"json_schema": SCHEMA}, "ignore_eos": False, "logprobs": 2},
    {**DRAWN, "stop_token_ids": [*range(0, EOS, 5)], "min_tokens": 4, "seed": 7},
]
NUM_TOKENS = 40
PROMPTS = [[(7 * i * i + 11 * n) % EOS for i in range(3 + 17 * n)] for n in range(len(ASKED))]
LEAVES = len(ASKED)  # the one whose client changes its mind
NUM_BLOCKS = 17  # one more than a whole context: somebody has to give way
ONE_POOL = ("1m", "1m:pp2", "1m:tp4")
Said = tuple[list[int], list[Any]]  # tokens, and what was told of their likelihood


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return odd_model.write(tmp_path_factory.mktemp("odd"))


async def serve(nodes: Nodes, connect: Connect, model: Path, layout: str) -> list[Said]:
    """All at once, beside one that leaves in the middle, from a node that then goes."""
    node = nodes.start(**settings_of(layout, model, NUM_BLOCKS))
    client = await connect(node)
    for number, (prompt, asked) in enumerate(zip(PROMPTS, ASKED, strict=True)):
        client.submit(number, prompt, max_tokens=NUM_TOKENS, **asked)
    client.submit(LEAVES, PROMPTS[0], max_tokens=MAX_LEN - len(PROMPTS[0]))
    await client.read_until(lambda: LEAVES in client.tokens)
    client.send(Abort(LEAVES))
    await client.finish(*range(LEAVES + 1))
    assert [end.reason for end in client.ends[LEAVES]] == ["cancelled"]
    ends = [client.ends[one][0] for one in range(LEAVES)]
    if layout in ONE_POOL:  # elsewhere requests may wait for each other instead
        assert any(end.timings["num_preemptions"] for end in ends)
    await settled(client)
    assert not audit(node)
    nodes.end()
    nodes.running.clear()
    return [(client.tokens[one], client.logprobs.get(one, [])) for one in range(LEAVES)]


@pytest.fixture(scope="module")
def alone() -> list[Said]:
    return []


LAYOUTS = ["1m:pp2", "1m:tp4", "1p:tp2,1d:pp2", "1m:ep4", "1m:pp2.ep2"]


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_a_shape_says_what_one_worker_says(
    nodes: Nodes, connect: Connect, model: Path, alone: list[Said], layout: str
) -> None:
    if not alone:
        alone += await serve(nodes, connect, model, "1m")
    said = await serve(nodes, connect, model, layout)
    assert [tokens for tokens, _ in said] == [tokens for tokens, _ in alone]
    for (_, likely), (_, known) in zip(said, alone, strict=True):
        for (logprob, ids, values), expected in zip(likely, known, strict=True):
            assert logprob == pytest.approx(expected[0], abs=1e-4)
            assert unpack_ids(ids) == unpack_ids(expected[1])
            assert unpack_floats(values) == pytest.approx(unpack_floats(expected[2]), abs=1e-4)
