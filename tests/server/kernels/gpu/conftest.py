"""Triton kernels run on the GPU where there is one; else their arithmetic is interpreted."""

from __future__ import annotations

import contextlib

import pytest
import torch

from server.kernels import (
    gpu_columns,
    gpu_combine,
    gpu_logits,
    gpu_partials,
    gpu_probabilities,
    gpu_rescale,
)
from tests.server.kernels.gpu.interpreter import interpreted

MODULES = (gpu_columns, gpu_combine, gpu_logits, gpu_partials, gpu_probabilities, gpu_rescale)


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """The kernels, interpreted on a machine without a GPU."""
    with contextlib.nullcontext() if torch.cuda.is_available() else interpreted(*MODULES):
        yield
