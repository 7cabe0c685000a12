"""Values that a client may send and that no request can have, against a node of real processes."""

from typing import Any

import pytest

from tests.fakes.model import expected_stream
from tests.process.conftest import Connect, Nodes


def nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


HOSTILE: dict[str, dict[str, Any]] = {
    "long list of stops": {"stop_token_ids": [5] * 4096},
    "long bias": {"logit_bias": {i: 1.0 for i in range(97)} | {0: [0] * 4096}},
    "deep nesting": {"max_tokens": nested(13)},
    "large value": {"temperature": b"x" * 4_000_000},
}
BEYOND_LIMITS: dict[str, dict[str, Any]] = {
    "list": {"stop_token_ids": [5] * 1_000_000},
    "map": {"logit_bias": dict.fromkeys(range(5000), 1.0)},
    "nesting": {"max_tokens": nested(500)},
    "text": {"x" * 200_000: 1},
    "containers": {"stop_token_ids": [[]] * 100},
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_value_ends_its_own_request_only(
    nodes: Nodes, connect: Connect, name: str
) -> None:
    node = nodes.start(layout="1p1d")
    client = await connect(node)
    client.submit(1, [3], max_tokens=50)
    client.submit(2, [3], **HOSTILE[name])
    client.submit(3, [4], max_tokens=5)
    await client.finish(1, 2, 3)
    assert client.ends[2][0].code == "invalid_request"
    assert len(client.ends[2][0].message) < 500
    assert client.tokens[1] == expected_stream([3], 50)
    assert client.tokens[3] == expected_stream([4], 5)


async def test_a_value_beyond_the_decoders_limits_ends_its_connection_only(
    nodes: Nodes, connect: Connect
) -> None:
    node = nodes.start(layout="1p1d")
    other = await connect(node)
    other.submit(1, [3], max_tokens=50)
    for value in BEYOND_LIMITS.values():
        client = await connect(node)
        client.submit(2, [3], **value)
        await client.read_to_end()
        assert client.goodbye is not None and client.goodbye.code == "protocol"
        assert not client.ends
    await other.finish(1)
    assert other.tokens[1] == expected_stream([3], 50)
