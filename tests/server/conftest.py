"""Settings of all tests of the server's parts."""

from __future__ import annotations

import pytest

from server.kernels import cpu


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Kernels for several threads take a minute to compile; tests of them ask for two."""
    cpu.set_threads(1)
