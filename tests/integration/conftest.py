"""One engine per module; engines are never run side by side."""

from __future__ import annotations

from pathlib import Path

import pytest

from server import models


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs an engine, and waits longer than unit tests may."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.engine)


@pytest.fixture(scope="session")
def model() -> Path:
    """Folder of the embedded default model."""
    return models.prepare(models.DEFAULT_MODEL, report=lambda _: None)
