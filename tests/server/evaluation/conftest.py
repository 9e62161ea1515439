"""Samples and a fake server to put them to."""

from __future__ import annotations

import httpx
import pytest

from server.evaluation import api
from server.evaluation.samples import Sample
from tests.server.evaluation.fake import FakeServer


@pytest.fixture(scope="session")
def make_sample():
    """A question; a chat where `chat` is a message's content."""

    def make(id="one", prompt="Is it?", choices=(" yes", " no"), answer=" yes", chat=None):
        messages = ({"role": "user", "content": chat},) if chat else ()
        return Sample(id, None if chat else prompt, messages, tuple(choices), answer)

    return make


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
async def connect():
    """A fake server's `Api`; keywords are the fake's."""
    clients = []

    async def make(*args, **kwargs):
        server = FakeServer(*args, **kwargs)
        client = httpx.AsyncClient(transport=httpx.MockTransport(server), base_url="http://fake")
        clients.append(client)
        return server, await api.acquainted(client)

    yield make
    for client in clients:
        await client.aclose()
