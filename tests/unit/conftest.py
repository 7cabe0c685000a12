"""Fixtures that several unit tests share: a scripted server, a client of it, a fake of CUDA."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from nodeserve import AsyncClient
from tests.fakes.cuda import load_fake_cuda
from tests.fakes.gguf_writer import CHAT_TEMPLATE, gpt2_metadata, write_gguf
from tests.fakes.server import FakeServer


def text_server(folder: Path) -> FakeServer:
    """One whose clients can chat."""
    metadata = gpt2_metadata(**{"tokenizer.chat_template": CHAT_TEMPLATE})
    tokenizer = write_gguf(folder / "model.gguf", metadata)
    return FakeServer(folder / "socket", tokenizer=str(tokenizer))


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[FakeServer]:
    async with text_server(tmp_path) as server:
        yield server


@pytest.fixture
async def client(server: FakeServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.path) as client:
        yield client


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`nodeserve._cuda` over two fake devices, where no work runs before somebody waits for it."""
    module = load_fake_cuda()
    monkeypatch.setenv("NODESERVE_FAKE_CUDA_MODE", "lazy")
    module.fake.reload_environment()
    yield module
    monkeypatch.undo()
    module.fake.reload_environment()
