"""Column means against the dense reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrators import reference
from server.kernels import cpu
from tests.server.kernels.paging import Problem, attention, problem
from tests.server.kernels.test_properties import problems, within


def dense(case: Problem, dtype: torch.dtype) -> torch.Tensor:
    """`[query_heads, rows]`, requests side by side."""
    probabilities = [case.dense(request, dtype)[0] for request in range(len(case.keys))]
    return torch.cat([reference.column_means(p) for p in probabilities], 1)


@settings(max_examples=60)
@given(problems(whole=True), st.data())
def test_column_means_match_the_reference(case, data):
    slots, query_heads = len(case.keys), case.query.shape[1]
    heads = torch.tensor([[data.draw(st.booleans()) for _ in range(query_heads)]] * slots)
    got = attention(case, heads).column_means()
    assert got[~heads[0]].count_nonzero() == 0
    chosen = heads[0].nonzero().flatten()
    if len(chosen):
        rough, exact = dense(case, torch.float32), dense(case, torch.float64)
        assert within(got[chosen], rough[chosen], exact[chosen])


def test_prompts_that_differ_in_heads_keep_apart():
    case = problem([40, 70], [40, 70])
    heads = torch.zeros(2, 6, dtype=torch.bool)
    heads[0, 1] = heads[1, 4] = True
    got, exact = attention(case, heads).column_means(), dense(case, torch.float64)
    assert within(got[1, :40], exact[1, :40].float(), exact[1, :40])
    assert within(got[4, 40:], exact[4, 40:].float(), exact[4, 40:])
    assert got.count_nonzero() == 40 + 70


@pytest.fixture
def two_threads():
    """The kernels with two threads, where this machine has them."""
    cpu.set_threads(2)
    yield
    cpu.set_threads(1)


def test_threads_change_no_bit(two_threads):
    case = problem([200, 7, 97], [200, 7, 97], dtype=torch.bfloat16)
    heads = torch.ones(3, 6, dtype=torch.bool)
    parallel = attention(case, heads).column_means()
    cpu.set_threads(1)
    assert torch.equal(parallel, attention(case, heads).column_means())
