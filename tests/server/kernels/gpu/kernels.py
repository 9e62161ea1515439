"""The modules whose kernels are interpreted where there is no GPU."""

import contextlib
from collections.abc import Iterator

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


@contextlib.contextmanager
def runnable() -> Iterator[None]:
    """The kernels on the GPU where there is one; else their arithmetic is interpreted."""
    with contextlib.nullcontext() if torch.cuda.is_available() else interpreted(*MODULES):
        yield
