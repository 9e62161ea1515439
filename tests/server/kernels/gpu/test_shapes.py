"""Kernels at the shapes of served models on a GPU; the same checks at a tenth of them elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from server.kernels import gpu
from server.kernels.partials import PoolTable
from tests.server.kernels.gpu.pages import DEVICE, attention, changes
from tests.server.kernels.gpu.test_rescale import budget, log_sum_exps, masses, stock_output
from tests.server.kernels.paging import Problem, problem
from tests.server.kernels.test_properties import EPS, dense, pool_map, rescaled, within
from tests.server.kernels.test_properties import weight_rounding as rounding

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@dataclass(frozen=True)
class Shape:
    """Of a step: query heads, KV heads and channels, and the keys and rows of its requests."""

    heads: tuple[int, int, int]
    lengths: tuple[int, ...]
    spans: tuple[int, ...]

    def problem(self, dtype: torch.dtype) -> Problem:
        query_heads, kv_heads, head_dim = self.heads
        lists = [*self.lengths], [*self.spans]
        shape = {"heads": query_heads, "kv_heads": kv_heads, "head_dim": head_dim}
        return problem(*lists, dtype=dtype, block=16, tile=32, **shape)


LLAMA, LLAVA = (32, 8, 128), (32, 32, 128)
SMALL = {
    "a tenth, generated": Shape((8, 2, 32), (205, 20, 130), (1, 1, 1)),
    "a tenth, a piece of a prompt": Shape((4, 4, 32), (90, 60), (35, 1)),
}
SERVED = {
    "Llama-3.1-8B, generated": Shape(LLAMA, (2048, 17, 700, 4096), (1, 1, 1, 1)),
    "Llama-3.1-8B, a piece of a prompt": Shape(LLAMA, (600, 2048), (129, 1)),
    "LLaVA-1.5-7B, generated": Shape(LLAVA, (700, 1500), (1, 1)),
    "LLaVA-1.5-7B, a piece of a prompt": Shape(LLAVA, (640,), (64,)),
}
SHAPES = [
    *(pytest.param(shape, id=name) for name, shape in SMALL.items()),
    *(pytest.param(shape, id=name, marks=on_gpu) for name, shape in SERVED.items()),
]
TYPES = (torch.float32, torch.float64)
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=SHAPES)
def shape(request):
    return request.param


@pytest.fixture(params=DTYPES, ids=str)
def case(request, shape):
    return shape.problem(request.param)


def every_head(case: Problem) -> torch.Tensor:
    return torch.ones(len(case.keys), case.query.shape[1], dtype=torch.bool)


def image_and_question(case: Problem) -> list[list[list[int]]]:
    """Two pools per request: its first half, and some of what follows."""
    lengths = [len(key) for key in case.keys]
    return [[[*range(n // 2)], [*range(n // 2 + 1, n, 5)]] for n in lengths]


@pytest.mark.parametrize("stock", [False, True], ids=["from nothing", "from stock attention"])
def test_rescaling_keeps_its_budget(case, stock):
    """ZeroTuning, by both ways."""
    requests, query_heads = len(case.keys), case.query.shape[1]
    factor = torch.tensor([0.3, 3.0, 1.5, 0.1])[:requests, None].repeat(1, query_heads)
    slot, whole = case.rows.slot.long(), stock_output(case)
    output, done = whole.to(DEVICE, copy=True), changes(len(slot), query_heads)
    computed = torch.full((requests,), not stock)
    known = log_sum_exps(case) if stock else None
    measured = attention(case, every_head(case), "NHD", known)
    measured.rescale(output, pool_map([[[0]]] * requests), factor, computed, done)
    mass = masses(case, [[0]] * requests)
    assert done.finite.all() and done.count.eq(1).all()
    torch.testing.assert_close(done.before.cpu().double(), mass, atol=4e-6, rtol=0)
    exact = rescaled(case, [[0]] * requests, factor, torch.float64)
    rough = rescaled(case, [[0]] * requests, factor, torch.float32)
    allowed = budget(case, exact, rough)
    if stock:
        # The stock output is rounded before it is divided by `1 + (f - 1) m`.
        eps = torch.finfo(case.query.dtype).eps
        allowed += eps * exact.abs().max().item() * float((1 / factor).clamp(min=1).max())
    assert (output.cpu().double() - exact).abs().max().item() <= allowed


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_partials_keep_their_budget(case, layout):
    pools = image_and_question(case)
    got = attention(case, every_head(case), layout).pool_partials(pool_map(pools))
    rough, exact = dense(case, pools, torch.float32), dense(case, pools, torch.float64)
    assert within(got.mass.cpu(), rough[0], exact[0])
    assert within(got.value.cpu(), rough[1], exact[1], rounding(case))


def test_rest_and_pools_together_are_the_stock_output(case):
    """Each halved, which the model's type does exactly; with 1 nothing would be written."""
    table = PoolTable.of(pool_map(image_and_question(case)), case.query.shape[1])
    found = attention(case, every_head(case)).pool_partials(table)
    output = torch.full_like(case.query, float("nan")).to(DEVICE)
    rows = torch.ones(found.mass.shape[:2], dtype=torch.bool, device=DEVICE)
    halves = torch.full_like(found.mass, 0.5)
    assert gpu.combine(output, case.rows, rows, found, halves).all()
    exact = stock_output(case).double() / 2
    eps = torch.finfo(case.query.dtype).eps
    allowed = 2 * eps * exact.abs().max().item() + rounding(case) + 64 * EPS
    assert (output.cpu().double() - exact).abs().max().item() <= allowed


def test_what_is_observed_keeps_its_budget(shape):
    """Probabilities of some keys, by row and head."""
    case = shape.problem(torch.bfloat16)
    keys = np.array([0, 5, 11, 16], dtype=np.int32)
    got = attention(case, every_head(case)).probabilities(keys)
    parts = {t: [case.dense(r, t)[0][..., keys] for r in range(len(case.keys))] for t in TYPES}
    rough, exact = (torch.cat(parts[t]).transpose(0, 1) for t in TYPES)
    assert within(got.cpu(), rough, exact)


def test_column_means_keep_their_budget(shape):
    """Of whole prompts."""
    lengths = tuple(min(n, 700) for n in shape.lengths[-2:])
    whole = Shape(shape.heads, lengths, lengths)
    case = whole.problem(torch.bfloat16)
    got = attention(case, every_head(case)).column_means().cpu()
    start = 0
    for request, length in enumerate(lengths):
        seen = torch.arange(length, 0, -1)
        rough, exact = (
            (case.dense(request, t)[0].sum(0) / seen.to(t)) for t in (torch.float32, torch.float64)
        )
        assert within(got[:, start : start + length], rough, exact)
        start += length
