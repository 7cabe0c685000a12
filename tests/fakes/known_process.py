"""`python -m tests.fakes.known_process PORT TTFT_S TPOT_S`: a server with an exact schedule, as a
process. It ends by a signal."""

import asyncio
import sys

from tests.fakes.known_server import OpenAIServer, steady


async def serve(port: int, ttft_s: float, tpot_s: float) -> None:
    async with OpenAIServer(steady(ttft_s, tpot_s), port=port):
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])))
