import pytest

from tests.server.kernels.gpu.kernels import runnable


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """The kernels on the GPU where there is one; else their arithmetic is interpreted."""
    with runnable():
        yield
