"""One engine per module; engines are never run side by side."""

from __future__ import annotations

from pathlib import Path

import pytest

from server import models


@pytest.fixture(scope="session")
def model() -> Path:
    """Folder of the embedded default model."""
    return models.prepare(models.DEFAULT_MODEL, report=lambda _: None)
