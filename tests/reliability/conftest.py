"""One server for all tests here: everything but the engine core is the real one."""

from __future__ import annotations

import os
import sys

import pytest

from server import models
from tests.integration.serving import serving

SHORT = 4


@pytest.fixture(scope="session")
def examples():
    """Cases per operation; a run that reports figures has more of them."""
    return int(os.environ.get("RELIABILITY_EXAMPLES", SHORT))


def program(*flags):
    return [sys.executable, "-m", "tests.reliability.serve", *flags]


@pytest.fixture(scope="session")
def embedded():
    """Folder of the model whose tokenizer and configuration all servers here have."""
    return models.prepare(models.DEFAULT_MODEL, report=lambda _: None)


@pytest.fixture(scope="package")
def server(embedded, tmp_path_factory):
    log = tmp_path_factory.mktemp("reliability") / "log"
    limits = ["--header-timeout", "1", "--body-timeout", "2"]
    written = ["--logging-config.formatter", "json"]
    with serving(log, "--max-model-len", "2048", *limits, *written, program=program) as running:
        yield running
