"""Flow control and order through the real socket: who is refused, who waits, who goes first."""

from typing import Any

import pytest

from nodeserve import AsyncClient
from nodeserve.errors import Overloaded
from nodeserve.wire.messages import Submit, pack_ids
from tests.fakes.model import expected_stream
from tests.fakes.raw_client import RawClient
from tests.patience import PATIENCE_S
from tests.process.conftest import Connect, Nodes

pytestmark = pytest.mark.slow

ONE_BY_ONE = {"layout": "1m", "max_num_seqs": 1, "fake": {"step_s": 0.01}}
HOPELESS = {"ttft_ms": 0.5}  # a step alone takes 10 ms


def request(request_id: int, slo: Any = None, priority: int = 0) -> Submit:
    sampling = {"max_tokens": 3, "temperature": 0.0, "ignore_eos": True}
    return Submit(request_id, pack_ids([request_id]), sampling, slo, priority)


async def warm(client: RawClient) -> None:
    """From a first request on it is known how long a pass takes."""
    client.send(request(0))
    await client.finish(0)


async def order_of(client: RawClient, *request_ids: int) -> list[int]:
    await client.finish(*request_ids)
    return [one for one in client.ends if one in request_ids]


async def test_what_cannot_be_in_time_is_refused_at_once(nodes: Nodes, connect: Connect) -> None:
    node = nodes.start(**ONE_BY_ONE)
    client = await connect(node)
    client.send(request(1, HOPELESS))
    await client.finish(1)
    assert client.ends[1][0].reason == "length", "nothing is known yet, so nobody is refused"
    client.send(request(2, HOPELESS), request(3, {"ttft_ms": 60_000}))
    await client.finish(2, 3)
    (refused,), (served,) = client.ends[2], client.ends[3]
    assert refused.code == "overloaded" and "the SLO is 0.0005 s" in refused.message
    assert refused.retry_after_s is not None and 0.0 < refused.retry_after_s < 10.0
    assert served.reason == "length" and served.retry_after_s is None
    assert client.tokens[3] == expected_stream([3], 3)
    async with AsyncClient(node.socket) as library:
        with pytest.raises(Overloaded, match="try again in") as caught:
            await library.generate([5], detokenize=False, slo=HOPELESS)
        assert caught.value.retry_after_s == pytest.approx(refused.retry_after_s, rel=5.0)


async def test_the_servers_slo_is_for_requests_without_one(nodes: Nodes, connect: Connect) -> None:
    node = nodes.start(**ONE_BY_ONE, slo="ttft=0.5ms,tpot=1s")
    client = await connect(node)
    patient = {"ttft_ms": 60_000}
    client.send(request(1, patient))
    await client.finish(1)
    client.send(request(2), request(3, {"tpot_ms": 1.0}), request(4, patient))
    await client.finish(2, 3, 4)
    assert [client.ends[one][0].code for one in (2, 3, 4)] == ["overloaded", "overloaded", None]


async def test_best_effort_goes_behind_those_that_can_be_in_time(
    nodes: Nodes, connect: Connect
) -> None:
    node = nodes.start(**ONE_BY_ONE, on_overload="queue")
    client = await connect(node)
    await warm(client)
    client.send(request(1), request(2, HOPELESS), request(3))
    assert await order_of(client, 1, 2, 3) == [1, 3, 2]
    assert client.tokens[2] == expected_stream([2], 3)


async def test_the_highest_priority_goes_first(nodes: Nodes, connect: Connect) -> None:
    node = nodes.start(**ONE_BY_ONE)
    client = await connect(node)
    await warm(client)
    priorities = {1: 0, 2: -1, 3: 0, 4: 9, 5: 0}
    client.send(*(request(one, priority=priority) for one, priority in priorities.items()))
    stats = await client.stats()
    order = await order_of(client, 1, 2, 3, 4, 5)
    # The first may have left before the others were read.
    assert order in ([4, 1, 3, 5, 2], [1, 4, 3, 5, 2])
    assert stats["dispatch"]["admission"] == "staggered"
    assert sum(one["requests"] for one in stats["dispatch"]["queue"]) == stats["requests"]["queued"]


@pytest.mark.parametrize("bound", [{"max_num_queued_reqs": 3}, {"max_num_queued_tokens": 3}])
async def test_a_full_buffer_refuses_whoever_comes(
    nodes: Nodes, connect: Connect, bound: dict[str, int]
) -> None:
    """Also where what misses its SLO may wait: the bounds are the memory's."""
    node = nodes.start(**ONE_BY_ONE, **bound, on_overload="queue")
    client = await connect(node)
    await warm(client)
    client.send(*map(request, range(1, 30)))
    await client.finish(*range(1, 30))
    codes = [client.ends[one][0].code for one in range(1, 30)]
    assert codes[:3] == [None] * 3 and codes.count("overloaded") >= 20
    assert all(
        end.retry_after_s is not None and end.retry_after_s > 0.0
        for (end,) in client.ends.values()
        if end.code == "overloaded"
    )
    stats = await client.stats()
    assert stats["requests"]["rejected"] == codes.count("overloaded")


@pytest.mark.parametrize("settings", [{"slo": "fast"}, {"window": "soon"}, {"admission": "best"}])
def test_a_setting_that_means_nothing_fails_the_start(
    nodes: Nodes, settings: dict[str, Any]
) -> None:
    node = nodes.spawn(layout="1m", **settings)
    _, words = node.process.communicate(timeout=PATIENCE_S)
    ((name, value),) = settings.items()
    assert node.process.returncode == 1 and f"--{name} {value}" in words.replace("'", "")
