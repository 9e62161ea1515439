"""One server for all tests of the HTTP surface."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.integration.profiles import write_profile
from tests.integration.serving import Server, serving


@pytest.fixture(scope="package")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    strengths = {"3": {"0": 0.3, "8": 2}, "20": {"4": 0.6}}
    profiles = write_profile(folder / "profiles", model, "by-head", strengths=strengths)
    presets = folder / "presets.toml"
    presets.write_text("[presets.calm]\nmethod = 'zerotuning'\ngamma = 0.3\n")
    flags = ["--max-model-len", "2048", "--enable-prompt-tokens-details"]
    flags += ["--calibration-profiles", str(profiles), "--calibration-presets", str(presets)]
    with serving(folder / "log", *flags) as running:
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
