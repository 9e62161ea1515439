"""One server for all tests of the HTTP surface."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.integration.serving import Server, serving


@pytest.fixture(scope="package")
def server(model: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(log, "--max-model-len", "2048", "--enable-prompt-tokens-details") as running:
        yield running


@pytest.fixture(scope="package")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120
    ) as client:
        yield client


@pytest.fixture(scope="package")
def name(client: openai.OpenAI) -> str:
    """The served model's name."""
    return client.models.list().data[0].id
