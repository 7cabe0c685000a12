"""Requests sent when their time has come, whether or not earlier ones were answered."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from nodeserve import AsyncClient
from nodeserve.errors import NodeServeError
from nodeserve.plan.records import Arrival
from nodeserve.types import Timings


@dataclass(frozen=True, slots=True)
class Answered:
    """One request of the trace. `timings` is the server's account, `ttft_s` the client's; `error`
    is the code of what ended it, None where it ended well."""

    arrival: Arrival
    late_s: float  # that it was sent behind its time
    timings: Timings | None
    ttft_s: float | None
    error: str | None


async def replay(
    client: AsyncClient, arrivals: Sequence[Arrival], limit_s: float
) -> list[Answered]:
    """Send a trace, sorted by time, over one connection; answers in its order.

    Prompts are token ids, answers greedy and as long as the trace says. TimeoutError when not all
    has ended `limit_s` seconds after the start: what runs then is cancelled.
    """
    await client.server()  # connected before the clock starts
    began_s = time.perf_counter()
    async with asyncio.timeout(limit_s), asyncio.TaskGroup() as group:
        tasks = []
        for arrival in arrivals:
            await asyncio.sleep(began_s + arrival.arrived_s - time.perf_counter())
            late_s = time.perf_counter() - began_s - arrival.arrived_s
            tasks.append(group.create_task(_ask(client, arrival, late_s)))
    return [task.result() for task in tasks]


async def _ask(client: AsyncClient, arrival: Arrival, late_s: float) -> Answered:
    try:
        answer = await client.generate(
            [1] * arrival.num_prompt_tokens,
            max_tokens=arrival.num_output_tokens,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            priority=arrival.priority,
        )
    except NodeServeError as error:
        return Answered(arrival, late_s, None, None, error.code)
    return Answered(arrival, late_s, answer.timings, answer.latency.ttft_s, None)
