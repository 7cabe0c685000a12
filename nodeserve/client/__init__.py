"""The client library: `Client` for threads, `AsyncClient` for asyncio.

with Client() as client:
    print(client.generate("The capital of France is", max_tokens=16).text)
    for chunk in client.chat([{"role": "user", "content": "Hello"}], stream=True):
        print(chunk.text, end="", flush=True)
"""

from nodeserve.client.aio import AsyncClient
from nodeserve.client.results import Audit, Chunk, Completion, Health, Latency, Usage
from nodeserve.client.sync import Client

__all__ = [
    "AsyncClient",
    "Audit",
    "Chunk",
    "Client",
    "Completion",
    "Health",
    "Latency",
    "Usage",
]
