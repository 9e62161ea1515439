"""Every Triton kernel down to the machine code of GPUs that are not here.

An interpreter takes what a compiler refuses: types that change within a loop, products of too few
rows, more shared memory than there is.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from server.kernels import gpu
from server.kernels.partials import Partials, PoolTable
from tests.server.kernels.gpu.offline import compiling
from tests.server.kernels.gpu.pages import attention, changes
from tests.server.kernels.paging import problem
from tests.server.kernels.test_cpu import key_zero
from tests.server.kernels.test_properties import pool_map

# What a block may have on a GPU of compute capability 8.6 or 8.9, the least of those supported.
SHARED = 99 * 1024

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the kernels themselves run on this machine's GPU"
)


@pytest.fixture(scope="module")
def kernels():
    """The kernels as they are, not interpreted."""


def launch_everything(rows: int) -> None:
    """A generated row and some of a prompt."""
    shape = {"heads": 8, "head_dim": 128, "block": 16, "tile": 32}
    case = problem([64, 90], [1, rows], dtype=torch.bfloat16, **shape)
    case = replace(case, geometry=replace(case.geometry, soft_cap=5.0, alibi_slopes=torch.ones(8)))
    heads, none = torch.ones(2, 8, dtype=torch.bool), torch.zeros(2, dtype=torch.bool)
    output, half, key = torch.zeros_like(case.query), torch.full((2, 8), 0.5), key_zero(2)
    measured = attention(case, heads)
    measured.rescale(output, key, half, none, changes(1 + rows, 8))
    stock = torch.zeros(8, 1 + rows)
    attention(case, heads, stock=stock).rescale(output, key, half, none, changes(1 + rows, 8))
    measured.column_means()
    measured.probabilities(np.arange(5, dtype=np.int32))
    table = PoolTable.of(pool_map([[[0], [1, 2]], [[3], []]]), 8)
    above = torch.full_like(table.above, 0.1)
    found = measured.pool_partials(replace(table, weights=torch.ones(4), above=above))
    every = torch.ones(1 + rows, 8, dtype=torch.bool)
    gpu.combine(output, case.rows, every, found, found.mass)
    scaled = Partials(0, found.mass, found.value)
    gpu.combine(output, case.rows, every, scaled, found.mass[..., :1].contiguous())


@pytest.mark.parametrize(
    ("capability", "rows"),
    [(90, 1), *(pytest.param(*each, marks=pytest.mark.long) for each in [(80, 1), (80, 40)])],
)
def test_kernels_compile(capability, rows, monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    with compiling(capability) as compiled:
        launch_everything(rows)
    names = {name for name, _ in compiled}
    expected = {"divide", "reduce", "finish", "correct", "column_means", "probabilities", "combine"}
    assert names == expected
    assert all(kernel.asm["cubin"] for _, kernel in compiled)
    assert max(kernel.metadata.shared for _, kernel in compiled) <= SHARED
