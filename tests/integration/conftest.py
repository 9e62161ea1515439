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


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Two engines side by side take far more than twice the time; so does every fixture here."""
    if hasattr(item.config, "workerinput") and not item.nodeid.endswith("@engine"):
        pytest.fail("several test processes need --dist loadgroup, which leaves engines to one")


@pytest.fixture(scope="session")
def model() -> Path:
    """Folder of the embedded default model."""
    return models.prepare(models.DEFAULT_MODEL, report=lambda _: None)
