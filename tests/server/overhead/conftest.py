"""A fake server, and the clock that it moves in place of the real one."""

from types import SimpleNamespace

import httpx
import pytest

from server.evaluation import api
from server.overhead import rounds, timing
from tests.server.overhead.fake import FakeServer


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
def make_server(monkeypatch):
    """A fake server whose clock times requests and rounds; keywords are the fake's."""

    def make(*args, **kwargs):
        fake = FakeServer(*args, **kwargs)
        clock = SimpleNamespace(perf_counter=fake.perf_counter)
        for module in (rounds, timing):
            monkeypatch.setattr(module, "time", clock)
        return fake

    return make


@pytest.fixture
async def connect(make_server):
    """A fake server and its `Api`; keywords are the fake's."""
    clients = []

    async def make(*args, **kwargs):
        fake = make_server(*args, **kwargs)
        client = httpx.AsyncClient(transport=httpx.MockTransport(fake), base_url="http://fake")
        clients.append(client)
        return fake, await api.acquainted(client)

    yield make
    for client in clients:
        await client.aclose()
