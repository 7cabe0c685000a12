"""Fixtures that several unit tests share: a scripted server and a client of it."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nodeserve import AsyncClient
from tests.fakes.gguf_writer import gpt2_metadata, write_gguf
from tests.fakes.server import FakeServer

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[FakeServer]:
    metadata = gpt2_metadata(**{"tokenizer.chat_template": TEMPLATE})
    tokenizer = write_gguf(tmp_path / "model.gguf", metadata)
    async with FakeServer(tmp_path / "socket", tokenizer=str(tokenizer)) as server:
        yield server


@pytest.fixture
async def client(server: FakeServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.path) as client:
        yield client
